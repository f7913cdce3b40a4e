"""SAEBench's scores: which of them are shown, and which way each is better."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from sae_lens_atm.metrics.figures import ARROWS, Figure

SCORES: dict[str, dict[str, Figure]] = {
    "absorption": {
        "mean.mean_absorption_fraction_score": Figure("absorption, fraction", -1, 4),
        "mean.mean_full_absorption_score": Figure("absorption, full", -1, 4),
        "mean.mean_num_split_features": Figure("latents of a letter", 0, 2),
        "probes.f1_probe": Figure("F1 of the letter probes", 0),
        "probes.f1_sparse_sae_1": Figure("F1 of one latent", 1),
    },
    "core": {
        "sparsity.l0": Figure("L0", 0, 2),
        "reconstruction_quality.explained_variance": Figure("explained variance", 1),
        "reconstruction_quality.cossim": Figure("cosine", 1),
        "model_performance_preservation.ce_loss_score": Figure("CE loss recovered", 1),
        "model_behavior_preservation.kl_div_score": Figure("KL recovered", 1),
        "misc_metrics.frac_alive": Figure("latents alive", 1),
    },
    "sparse_probing": {
        "sae.sae_top_1_test_accuracy": Figure("accuracy, 1 latent", 1),
        "sae.sae_top_2_test_accuracy": Figure("accuracy, 2 latents", 1),
        "sae.sae_top_5_test_accuracy": Figure("accuracy, 5 latents", 1),
        "sae.sae_test_accuracy": Figure("accuracy, all latents", 1),
        "llm.llm_test_accuracy": Figure("accuracy, no SAE", 0),
    },
}
"""By eval, then by where in SAEBench's `eval_result_metrics` it is. SAEBench's own plots show
1 - absorption; its files, and these tables, absorption itself. Its `mse` is divided by the number
of tokens twice, and left out."""

_BETTER = {1: "higher", -1: "lower", 0: None}


def scores_of(evals: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The scores that were found, each with the side on which it is better."""
    return [
        {
            "eval": name,
            "score": path.rpartition(".")[2],
            "label": figure.label,
            "value": value,
            "better": _BETTER[figure.better],
        }
        for name, found in evals.items()
        for path, figure in SCORES[name].items()
        if (value := _value(found, path)) is not None
    ]


def table(title: str, evals: Mapping[str, Any]) -> Table:
    """One row a score, with an arrow to its better side."""
    rows = Table(title=title, caption="↑ higher is better, ↓ lower is better")
    rows.add_column("eval")
    rows.add_column("score")
    rows.add_column("value", justify="right")
    for name, found in evals.items():
        for path, figure in SCORES[name].items():
            value = _value(found, path)
            if value is not None:
                label = figure.label + ARROWS[figure.better]
                rows.add_row(name, label, f"{value:.{figure.digits}f}")
    return rows


def _value(found: Mapping[str, Any], path: str) -> float | None:
    group, _, name = path.partition(".")
    return found.get("eval_result_metrics", {}).get(group, {}).get(name)
