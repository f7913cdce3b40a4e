"""The figures that a comparison reports: their names, which way is better, how they are shown."""

from typing import NamedTuple


class Figure(NamedTuple):
    """How one figure is shown."""

    label: str
    better: int
    """1 if more is better, -1 if less is, 0 if neither."""
    digits: int = 3


ARROWS = {1: " ↑", -1: " ↓", 0: ""}
"""To the better side."""

FIGURES: dict[str, Figure] = {
    "l0": Figure("L0", 0, 2),
    "explained_variance": Figure("explained variance", 1),
    "mse": Figure("MSE", -1),
    "cosine": Figure("cosine", 1),
    "shrinkage": Figure("shrinkage", 0),
    "dead_latents": Figure("dead latents", -1, 1),
    "mcc": Figure("MCC", 1),
    "f1": Figure("F1", 1),
    "precision": Figure("precision", 1),
    "recall": Figure("recall", 1),
    "uniqueness": Figure("uniqueness", 1),
    "absorption_full": Figure("absorption, full", -1),
    "absorption_fraction": Figure("absorption, fraction", -1),
    "recall_gap": Figure("recall gap", -1),
    "absorption_full_learned": Figure("full, learned pairs", -1),
    "absorption_fraction_learned": Figure("fraction, learned pairs", -1),
    "parents_learned": Figure("parents learned", 1),
    "children_learned": Figure("children learned", 1),
    "probe_f1": Figure("letter probes, F1", 0),
    "letters": Figure("letters that count", 0, 0),
    "k1_f1": Figure("best latent, F1", 1),
    "feature_splits": Figure("feature splits", 0, 2),
    "sparse_probing_1": Figure("sparse probing, k 1", 1),
    "sparse_probing_2": Figure("sparse probing, k 2", 1),
    "sparse_probing_5": Figure("sparse probing, k 5", 1),
    "ce_loss_score": Figure("CE loss recovered", 1),
    "kl_div_score": Figure("KL recovered", 1),
    "stability": Figure("stability", 1),
    "seconds": Figure("training, s", 0, 0),
    "step_ms": Figure("step, ms", 0, 1),
    "peak_memory_mib": Figure("peak memory, MiB", 0, 0),
}
"""In the order of the tables. Anything else that is measured follows after."""
NEEDS = {
    **dict.fromkeys(("mcc", "f1", "precision", "recall", "uniqueness"), "synthetic"),
    **dict.fromkeys(("recall_gap", "children_learned"), "synthetic"),
    **dict.fromkeys(("ce_loss_score", "kl_div_score"), "model"),
    **dict.fromkeys(
        ("k1_f1", "sparse_probing_1", "sparse_probing_2", "sparse_probing_5"), "letters"
    ),
    **dict.fromkeys(
        (
            "absorption_full",
            "absorption_fraction",
            "absorption_full_learned",
            "absorption_fraction_learned",
            "parents_learned",
        ),
        "parents",
    ),
    "stability": "seeds",
}
"""What some of them need: synthetic data, a language model, first letters, one of these that has
parents and children, several seeds."""


def figure(name: str) -> Figure:
    """How a figure is shown, those unknown here included."""
    return FIGURES.get(name, Figure(name.replace("_", " "), 0))
