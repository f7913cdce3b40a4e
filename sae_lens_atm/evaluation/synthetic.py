"""Figures of an SAE on a synthetic model: SAELens' own, and absorption."""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.synthetic import SyntheticModel, feature_uniqueness, mean_correlation_coefficient
from sae_lens.synthetic.evals import (
    ClassificationMetricsCalculator,
    L0Calculator,
    ShrinkageCalculator,
)
from sae_lens.util import temporary_seed
from torch import Tensor

from sae_lens_atm.data.synthetic import children_of
from sae_lens_atm.metrics import (
    Absorption,
    AbsorptionScores,
    HierarchyScore,
    NthDecoderProjection,
    decoder_cosine,
    description_length,
    saved_bits,
)
from sae_lens_atm.metrics.hierarchy import FEWEST_SAMPLES


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate_closely`."""

    figures: dict[str, float]
    alive: Tensor
    """Which latents fired, bool, shape ``(d_sae,)``."""
    absorption: AbsorptionScores | None
    """None if the model has no hierarchy."""
    parent_probability: list[float]
    """How often each parent was active."""
    signed: bool
    """Whether activations can be negative, as in AbsTopK."""


def evaluate(
    sae: SAE[Any], model: SyntheticModel, samples: int, seed: int, batch_size: int = 4096
) -> dict[str, float]:
    """Return figures of an SAE on fresh samples of a synthetic model.

    The samples depend on the seed alone. The global random state is restored.

    Args:
        sae: the SAE. It is evaluated in eval mode.
        model: the synthetic model.
        samples: number of samples.
        seed: seed of the samples.
        batch_size: samples in a batch.
    """
    return evaluate_closely(sae, model, samples, seed, batch_size).figures


@torch.no_grad()
def is_signed(sae: SAE[Any]) -> bool:
    """Return whether activations can be negative, as in AbsTopK. Tests the SAE on noise."""
    with temporary_seed(0):
        x = torch.randn(256, sae.cfg.d_in).to(sae.device, sae.dtype)
    return bool((sae.encode(x).to_dense() < 0).any())


def decoder_of_activations(sae: SAE[Any]) -> Tensor:
    """Return the rows that the activations from `encode` multiply, shape ``(d_sae, d_in)``.

    With ``rescale_acts_by_decoder_norm``, activations are those for rows of unit length. The result
    is float32 for an SAE of any dtype.
    """
    decoder = sae.W_dec.float()
    if not getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        return decoder
    return decoder / decoder.norm(dim=-1, keepdim=True)


@torch.no_grad()
def decoder_figures(
    sae: SAE[Any], alive: Tensor, x: Tensor | None, acts: Tensor | None = None
) -> dict[str, float]:
    """Return the figures by which an L0 can be chosen without labels.

    Args:
        sae: the SAE.
        alive: which latents fire, shape ``(d_sae,)``.
        x: inputs of the SAE, shape ``(samples, d_in)``. None leaves out the figures that need them.
        acts: activations of ``x``, if they are known.
    """
    figures = {"decoder_cosine": decoder_cosine(sae.W_dec, alive)}
    if x is None:
        return figures
    projection = NthDecoderProjection(sae.W_dec, sae.b_dec)
    projection.update(sae.run_time_activation_norm_fn_in(x.to(sae.device, sae.dtype)))
    figures["decoder_projection"] = projection.compute(alive)
    if sae.cfg.reshape_activations == "none":
        x = x.to(sae.device, sae.dtype)
        acts = sae.encode(x).to_dense() if acts is None else acts
        figures["saved_bits"] = bits_saved_by(sae, x, acts)
        figures["description_length"] = code_figure(sae, x, acts)
    return figures


@torch.no_grad()
def bits_saved_by(sae: SAE[Any], x: Tensor, acts: Tensor | None = None) -> float:
    """Return the saved bits of an SAE, in bits a sample.

    Args:
        sae: the SAE. It must not reshape activations.
        x: inputs of the SAE, shape ``(samples, d_in)``.
        acts: their activations, if they are known.
    """
    x = x.to(sae.device, sae.dtype)
    acts = sae.encode(x).to_dense() if acts is None else acts
    seen = sae.run_time_activation_norm_fn_in(x).float()
    return saved_bits(seen, acts.float(), decoder_of_activations(sae), sae.b_dec.float())


def code_figure(sae: SAE[Any], x: Tensor, acts: Tensor | None = None) -> float:
    """Return the description length of samples, in bits a sample."""
    acts = sae.encode(x).to_dense() if acts is None else acts
    normalises = sae.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale")

    def decode(rounded: Tensor) -> Tensor:
        if normalises:  # decoding needs, and forgets, the norms of the last samples encoded
            sae.encode(x)
        return sae.decode(rounded.to(sae.dtype))

    return description_length(acts, x, decode)


@torch.no_grad()
def evaluate_closely(
    sae: SAE[Any], model: SyntheticModel, samples: int, seed: int, batch_size: int = 4096
) -> Evaluation:
    """Return the figures of `evaluate`, and values for single latents and parents.

    ``mse`` is the squared error summed over dimensions, ``cosine`` the cosine similarity of a
    sample and its reconstruction. Both are means over samples, as in SAELens' evaluation on
    language models. The other figures of SAELens come from its own calculators.

    The SAE computes in its own dtype. The figures are computed in float32.
    """
    was_training = sae.training
    sae.eval()
    vectors, signed = model.feature_dict.feature_vectors, is_signed(sae)
    children = children_of(model.hierarchy) if model.hierarchy is not None else {}
    parents = torch.tensor(list(children), dtype=torch.long, device=vectors.device)
    decoder = decoder_of_activations(sae)
    absorption = Absorption(decoder, vectors, children, signed=signed) if children else None
    l0, true_l0, shrinkage = L0Calculator(), L0Calculator(), ShrinkageCalculator()
    explained = ExplainedVarianceCalculator()
    directions = sae.W_dec.float()
    hierarchy = HierarchyScore(directions) if samples >= FEWEST_SAMPLES else None
    classification = ClassificationMetricsCalculator(directions, vectors)
    fired = torch.zeros(sae.cfg.d_sae, device=sae.device)
    parents_fired = torch.zeros(len(parents), device=vectors.device)
    squared_error, cosine = 0.0, 0.0
    first, first_acts = torch.empty(0, sae.cfg.d_in), torch.empty(0, sae.cfg.d_sae)
    with temporary_seed(seed):
        for start in range(0, samples, batch_size):
            x, features = model.sample_with_features(min(batch_size, samples - start))
            features = features.to_dense()
            acts = sae.encode(x).to_dense()
            x_hat, acts = sae.decode(acts).float(), acts.float()
            if start == 0:
                first, first_acts = x, acts
            l0.add_batch(acts)
            true_l0.add_batch(features)
            shrinkage.add_batch(x_hat, x)
            explained.add_batch(x_hat, x)
            classification.add_batch(acts, features)
            if hierarchy is not None:
                hierarchy.update(x, acts)
            squared_error += (x - x_hat).pow(2).sum().item()
            cosine += torch.cosine_similarity(x, x_hat, dim=-1).sum().item()
            fired += (acts != 0).sum(0)
            if absorption is not None:
                absorption.update(acts, features)
                parents_fired += (features[:, parents] > 0).sum(0)
    sae.train(was_training)
    detection, alive = classification.compute(), (fired > 0).cpu()
    figures: dict[str, float] = {
        "l0": l0.compute(),
        "explained_variance": explained.compute(),
        "mse": squared_error / samples,
        "cosine": cosine / samples,
        "mcc": mean_correlation_coefficient(directions, vectors),
        "f1": detection.f1_score,
        "precision": detection.precision,
        "recall": detection.recall,
        "uniqueness": feature_uniqueness(directions, vectors),
        "shrinkage": shrinkage.compute(),
        "dead_latents": int((~alive).sum()),
        "evaluated_samples": samples,
        "true_l0": true_l0.compute(),
        **decoder_figures(sae, alive, first, first_acts),
    }
    if hierarchy is not None:
        figures["hierarchy_score"] = hierarchy.compute()
    scores = None if absorption is None else absorption.compute()
    if scores is not None:
        figures |= {
            "absorption_full": scores.full,
            "absorption_fraction": scores.fraction,
            "recall_gap": scores.recall_gap,
            "absorption_full_learned": scores.full_learned,
            "absorption_fraction_learned": scores.fraction_learned,
            "parents_learned": scores.parents_learned,
            "children_learned": scores.children_learned,
        }
    probabilities = (parents_fired / samples).tolist()
    return Evaluation(figures, alive, scores, probabilities, signed)
