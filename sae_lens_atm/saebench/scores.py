"""SAEBench's scores: which are shown, and whether higher or lower is better."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from sae_lens_atm.metrics.figures import Figure

SCORES: dict[str, dict[str, Figure]] = {
    "absorption": {
        "mean.mean_absorption_fraction_score": Figure("absorption, fraction", -1, digits=4),
        "mean.mean_full_absorption_score": Figure("absorption, full", -1, digits=4),
        "mean.mean_num_split_features": Figure("latents per letter", 0, digits=2),
        "probes.f1_probe": Figure("F1 of the letter probes", 0),
        "probes.f1_sparse_sae_1": Figure("F1 of one latent", 1),
    },
    "core": {
        "sparsity.l0": Figure("L0", 0, digits=2),
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
    "sae_probes": {
        "sae.sae_top_1_test_auc": Figure("AUC, 1 latent", 1),
        "sae.sae_top_2_test_auc": Figure("AUC, 2 latents", 1),
        "sae.sae_top_5_test_auc": Figure("AUC, 5 latents", 1),
        "llm.llm_test_auc": Figure("AUC, no SAE", 0),
        "sae.sae_top_1_test_accuracy": Figure("accuracy, 1 latent", 1),
        "sae.sae_top_2_test_accuracy": Figure("accuracy, 2 latents", 1),
        "sae.sae_top_5_test_accuracy": Figure("accuracy, 5 latents", 1),
        "llm.llm_test_accuracy": Figure("accuracy, no SAE", 0),
    },
}
"""Scores by eval, then by their place in SAEBench's `eval_result_metrics`.

SAEBench's plots show 1 - absorption. Its files, and these tables, show absorption. Its `mse` is
left out, as SAEBench divides it by the number of tokens twice.
"""

_BETTER = {1: "higher", -1: "lower", 0: None}


def scores_of(evals: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the scores in the results, each with the direction in which it is better."""
    return [
        {
            "eval": name,
            "score": path.rpartition(".")[2],
            "label": figure.label,
            "value": value,
            "better": _BETTER[figure.better],
        }
        for name, results in evals.items()
        for path, figure in SCORES[name].items()
        if (value := _value(results, path)) is not None
    ]


def table(title: str, evals: Mapping[str, Any]) -> Table:
    """Return a table with one row for each score, and an arrow to its better side."""
    rows = Table(title=title, caption="↑ higher is better, ↓ lower is better")
    rows.add_column("eval")
    rows.add_column("score")
    rows.add_column("value", justify="right")
    for name, results in evals.items():
        for path, figure in SCORES[name].items():
            value = _value(results, path)
            if value is not None:
                rows.add_row(name, figure.heading, f"{value:.{figure.digits}f}")
    return rows


def _value(results: Mapping[str, Any], path: str) -> float | None:
    group, _, name = path.partition(".")
    return results.get("eval_result_metrics", {}).get(group, {}).get(name)
