"""Figures of a SAE on a synthetic model: SAELens' own, and absorption beside them."""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.synthetic import SyntheticModel, eval_sae_on_synthetic_data
from sae_lens.util import temporary_seed
from torch import Tensor

from sae_lens_atm.data.synthetic import children_of
from sae_lens_atm.metrics import Absorption, AbsorptionScores


@dataclass(frozen=True)
class Evaluation:
    """All that `evaluate_closely` found."""

    figures: dict[str, float]
    alive: Tensor
    """Which latents fired at all, boolean."""
    absorption: AbsorptionScores | None
    """None where the model has no hierarchy."""
    parent_probability: list[float]
    """How often each parent was active."""
    signed: bool
    """Whether any activation was negative, as AbsTopK's may be."""


def evaluate(
    sae: SAE[Any], model: SyntheticModel, samples: int, seed: int, batch_size: int = 4096
) -> dict[str, float]:
    """Figures on samples that depend on the seed alone; global random state is left as it was."""
    return evaluate_closely(sae, model, samples, seed, batch_size).figures


@torch.no_grad()
def is_signed(sae: SAE[Any]) -> bool:
    """Whether activations can be negative, as AbsTopK's: seen on noise."""
    with temporary_seed(0):
        x = torch.randn(256, sae.cfg.d_in).to(sae.device, sae.dtype)
    return bool((sae.encode(x).to_dense() < 0).any())


@torch.no_grad()
def evaluate_closely(
    sae: SAE[Any], model: SyntheticModel, samples: int, seed: int, batch_size: int = 4096
) -> Evaluation:
    """`evaluate`, with what lies behind the figures.

    ``mse`` is the squared error of a sample, summed over dimensions, and ``cosine`` that of a
    sample and its reconstruction, both averaged over samples as in SAELens' language-model evals.
    """
    training = sae.training
    sae.eval()
    signed = is_signed(sae)
    with temporary_seed(seed):
        result = eval_sae_on_synthetic_data(
            sae, model.feature_dict, model.activation_generator, samples, batch_size
        )
        children = children_of(model.hierarchy) if model.hierarchy is not None else {}
        parents = torch.tensor(list(children), dtype=torch.long)
        metric: Absorption | None = None
        fired = torch.zeros(sae.cfg.d_sae)
        parents_fired = torch.zeros(len(parents))
        squared_error, cosine = 0.0, 0.0
        for start in range(0, samples, batch_size):
            x, features = model.sample_with_features(min(batch_size, samples - start))
            features = features.to_dense()
            acts = sae.encode(x).to_dense()
            x_hat = sae.decode(acts)
            squared_error += (x - x_hat).pow(2).sum().item()
            cosine += torch.cosine_similarity(x, x_hat, dim=-1).sum().item()
            fired += (acts != 0).sum(0).cpu()
            if children:
                if metric is None:
                    vectors = model.feature_dict.feature_vectors
                    metric = Absorption(sae.W_dec, vectors, children, signed=signed)
                metric.update(acts, features)
                parents_fired += (features[:, parents.to(features.device)] > 0).sum(0).cpu()
    sae.train(training)
    figures: dict[str, float] = {
        "l0": result.sae_l0,
        "explained_variance": result.explained_variance,
        "mse": squared_error / samples,
        "cosine": cosine / samples,
        "mcc": result.mcc,
        "f1": result.classification.f1_score,
        "precision": result.classification.precision,
        "recall": result.classification.recall,
        "uniqueness": result.uniqueness,
        "shrinkage": result.shrinkage,
        "dead_latents": result.dead_latents,
        "true_l0": result.true_l0,
    }
    scores = metric.compute() if metric is not None else None
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
    return Evaluation(figures, fired > 0, scores, (parents_fired / samples).tolist(), signed)
