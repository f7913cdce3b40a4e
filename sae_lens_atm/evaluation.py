"""Figures of a SAE on a synthetic model: SAELens' own, and absorption beside them."""

import json
import math
from typing import Any, cast

import torch
from sae_lens import SAE
from sae_lens.synthetic import SyntheticModel, eval_sae_on_synthetic_data
from sae_lens.util import temporary_seed

from sae_lens_atm.metrics import Absorption, AbsorptionScores
from sae_lens_atm.synthetic import children_of

BETTER = {
    **dict.fromkeys(("explained_variance", "mcc", "f1", "precision", "recall", "uniqueness"), "↑"),
    **dict.fromkeys(("parents_learned", "children_learned"), "↑"),
    **dict.fromkeys(("dead_latents", "absorption_full", "absorption_fraction"), "↓"),
    **dict.fromkeys(("absorption_full_learned", "absorption_fraction_learned"), "↓"),
}
"""Which way a figure is better."""


@torch.no_grad()
def measure_absorption(
    sae: SAE[Any], model: SyntheticModel, samples: int, batch_size: int = 4096
) -> AbsorptionScores | None:
    """Absorption on fresh samples; None where the model has no hierarchy."""
    children = children_of(model.hierarchy) if model.hierarchy is not None else {}
    if not children:
        return None
    metric = Absorption(sae.W_dec, model.feature_dict.feature_vectors, children)
    training = sae.training
    sae.eval()
    for start in range(0, samples, batch_size):
        x, features = model.sample_with_features(min(batch_size, samples - start))
        metric.update(sae.encode(x).to_dense(), features.to_dense())
    sae.train(training)
    return metric.compute()


def evaluate(
    sae: SAE[Any], model: SyntheticModel, samples: int, seed: int, batch_size: int = 4096
) -> dict[str, float]:
    """Figures on samples that depend on the seed alone; global random state is left as it was."""
    with temporary_seed(seed):
        result = eval_sae_on_synthetic_data(
            sae, model.feature_dict, model.activation_generator, samples, batch_size
        )
        scores = measure_absorption(sae, model, samples, batch_size)
    figures: dict[str, float] = {
        "l0": result.sae_l0,
        "explained_variance": result.explained_variance,
        "mcc": result.mcc,
        "f1": result.classification.f1_score,
        "precision": result.classification.precision,
        "recall": result.classification.recall,
        "uniqueness": result.uniqueness,
        "shrinkage": result.shrinkage,
        "dead_latents": result.dead_latents,
        "true_l0": result.true_l0,
    }
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
    return figures


def to_json(value: Any) -> str:
    """JSON text, in which NaN (a mean over nothing) is null: JSON has no other word for it."""
    return json.dumps(_without_nan(value), indent=2)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(v) for key, v in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in cast(list[Any], value)]
    return None if isinstance(value, float) and math.isnan(value) else value
