"""The figures of an SAE: their labels, their better direction and their digits."""

from typing import NamedTuple


class Figure(NamedTuple):
    """The display settings of a figure."""

    label: str
    better: int
    """1: higher is better. -1: lower is better. 0: neither."""
    digits: int = 3
    """Digits after the decimal point."""


ARROWS = {1: " ↑", -1: " ↓", 0: ""}
"""Arrows to better values, by `Figure.better`."""

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
"""The figures in the order of the tables. Other figures come after them."""
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
"""What a figure needs: synthetic data, a language model, first letters, several seeds, or parents,
which synthetic data and first letters have."""


def figure(name: str) -> Figure:
    """Return the display settings of a figure, or default ones for a name not in `FIGURES`."""
    return FIGURES.get(name, Figure(name.replace("_", " "), 0))
