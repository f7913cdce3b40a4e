"""The figures of an SAE: their labels, better direction, definitions and digits."""

import re
from typing import NamedTuple


class Figure(NamedTuple):
    """The display settings of a figure."""

    label: str
    better: int
    """1: higher is better. -1: lower is better. 0: neither."""
    meaning: str = ""
    """The definition, in one sentence."""
    digits: int = 3
    """Digits after the decimal point."""

    @property
    def arrow(self) -> str:
        """A space and an arrow to better values; nothing if neither direction is better."""
        return {1: " ↑", -1: " ↓", 0: ""}[self.better]

    @property
    def heading(self) -> str:
        """The label, followed by the arrow."""
        return self.label + self.arrow


def _on_tasks(score: str, k: int | None) -> Figure:
    """Return the display settings of a score of probes on tasks; None: on all dimensions."""
    label, begin = {
        "auc": ("AUC", "Area under the ROC curve"),
        "accuracy": ("accuracy", "Accuracy"),
    }[score]
    if k is None:
        return Figure(
            f"probe {label}, no SAE",
            0,
            f"{begin} of a logistic regression on the model's own activations, averaged over tasks "
            "of sae-probes; probes of an SAE rarely exceed it.",
        )
    latents = "latent that differs" if k == 1 else f"{k} latents that differ"
    return Figure(
        f"probe {label}, k {k}",
        1,
        f"{begin} of a logistic regression on the {latents} most between the two classes of a "
        "task, averaged over tasks of sae-probes.",
    )


FIGURES: dict[str, Figure] = {
    "l0": Figure(
        "L0",
        0,
        "Number of latents that fire on a sample, averaged over samples.",
        2,
    ),
    "true_l0": Figure(
        "true L0",
        0,
        "Number of true features that are active on a sample, averaged over samples.",
        2,
    ),
    "explained_variance": Figure(
        "explained variance",
        1,
        "Share of the variance of the samples that the reconstruction explains.",
    ),
    "mse": Figure(
        "MSE",
        -1,
        "Squared error of the reconstruction, summed over dimensions and averaged over samples.",
    ),
    "cosine": Figure(
        "cosine",
        1,
        "Cosine of a sample and its reconstruction, averaged over samples.",
    ),
    "shrinkage": Figure(
        "shrinkage",
        0,
        "Norm of the reconstruction divided by the norm of the sample, averaged over samples.",
    ),
    "dead_latents": Figure(
        "dead latents",
        -1,
        "Number of latents that fire on no sample of a window: in tables the evaluation and, if "
        "activations are stored, 50,000 of them; in curves the last dead_feature_window steps of "
        "training.",
        1,
    ),
    "evaluated_samples": Figure(
        "evaluated samples",
        0,
        "Number of samples, or of tokens of a language model, in the evaluation.",
        0,
    ),
    "dead_window": Figure(
        "window of dead latents",
        0,
        "Number of tokens of a language model on which dead latents are counted.",
        0,
    ),
    "decoder_cosine": Figure(
        "c_dec",
        0,
        "Absolute cosine of two decoder rows, averaged over all pairs of latents that fire; on "
        "some data it is least near the true L0.",
        4,
    ),
    "decoder_projection": Figure(
        "s_n_dec",
        0,
        "The n-th largest projection of a sample on the decoder rows of unit length, n being half "
        "of the latents that fire.",
    ),
    "description_length": Figure(
        "description length",
        0,
        "Bits that the activations of a sample take, with each latent coded on its own and "
        "activations rounded as coarsely as reconstruction allows.",
        1,
    ),
    "saved_bits": Figure(
        "saved bits",
        0,
        "Bits per sample that a code of activations and error needs less than a Gaussian code; "
        "largest near the true L0, and below the true L0 with fewer latents than features.",
        1,
    ),
    "hierarchy_score": Figure(
        "hierarchy",
        1,
        "Share of parent-child pairs of latents with both decoder rows among the five nearest to "
        "a probe for the child, which fires mostly with its parent (Tree SAE's hierarchy score).",
    ),
    "mcc": Figure(
        "MCC",
        1,
        "Cosine, without its sign, of decoder rows and true features, averaged over the best "
        "one-to-one match.",
    ),
    "f1": Figure(
        "F1",
        1,
        "F1 of a latent as a detector of the true feature nearest to its decoder row, "
        "averaged over latents.",
    ),
    "precision": Figure(
        "precision",
        1,
        "Share of the samples on which a latent fires that have its nearest true feature, "
        "averaged over latents.",
    ),
    "recall": Figure(
        "recall",
        1,
        "Share of the samples with its nearest true feature on which a latent fires, averaged "
        "over latents.",
    ),
    "uniqueness": Figure(
        "uniqueness",
        1,
        "Number of true features that are nearest to at least one latent, divided by the "
        "number of latents.",
    ),
    "absorption_full": Figure(
        "absorption, full",
        -1,
        "Share of a parent's samples on which none of its main latents fires and one other "
        "latent carries at least 0.4 of it, averaged over parents (SAEBench 0.6.0's definition).",
    ),
    "absorption_fraction": Figure(
        "absorption, fraction",
        -1,
        "Share of a parent's direction that other latents carry instead of its main latents, "
        "averaged over its samples, then over parents (SAEBench 0.6.0's definition).",
    ),
    "l0_words": Figure(
        "L0 on words",
        0,
        "Number of latents that fire on a word in the prompts in which absorption is measured, "
        "averaged over words.",
        2,
    ),
    "recall_gap": Figure(
        "recall gap",
        -1,
        "Recall of a parent's main latents on samples without an active child, minus their "
        "recall on samples with one, averaged over parents.",
    ),
    "absorption_full_learned": Figure(
        "full, learned pairs",
        -1,
        "Absorption, full, only on samples with an active child that has a latent of its own "
        "(cosine above 0.8); for first letters, only for letters whose best latent has an F1 "
        "of at least 0.5.",
    ),
    "absorption_fraction_learned": Figure(
        "fraction, learned pairs",
        -1,
        "Absorption, fraction, only on samples with an active child that has a latent of its "
        "own (cosine above 0.8); for first letters, only for letters whose best latent has an "
        "F1 of at least 0.5.",
    ),
    "parents_learned": Figure(
        "parents learned",
        1,
        "Share of parents with a latent of their own (cosine above 0.8); for first letters, "
        "share of letters whose best latent has an F1 of at least 0.5.",
    ),
    "children_learned": Figure(
        "children learned",
        1,
        "Share of children with a latent of their own (cosine above 0.8).",
    ),
    "probe_f1": Figure(
        "letter probes, F1",
        0,
        "F1 of a linear probe of the model's activations for a word's first letter, averaged "
        "over the letters that count.",
    ),
    "letters": Figure(
        "letters that count",
        0,
        "Number of first letters whose probe has an F1 above min_f1 (0.6 by default); 0 if there "
        "are fewer than 20.",
        0,
    ),
    "k1_f1": Figure(
        "best latent, F1",
        1,
        "F1 of a logistic regression on the best latent of a first letter, averaged over the "
        "letters that count.",
    ),
    "feature_splits": Figure(
        "feature splits",
        0,
        "Number of main latents of a first letter, averaged over the letters that count.",
        2,
    ),
    "sparse_probing_1": Figure(
        "sparse probing, k 1",
        1,
        "Balanced accuracy of a logistic regression on the best latent of a first letter, "
        "averaged over the letters that count.",
    ),
    "sparse_probing_2": Figure(
        "sparse probing, k 2",
        1,
        "Balanced accuracy of a logistic regression on the 2 best latents of a first letter, "
        "averaged over the letters that count.",
    ),
    "sparse_probing_5": Figure(
        "sparse probing, k 5",
        1,
        "Balanced accuracy of a logistic regression on the 5 best latents of a first letter, "
        "averaged over the letters that count.",
    ),
    **{
        f"probe_{score}_{'raw' if k is None else f'k{k}'}": _on_tasks(score, k)
        for score in ("auc", "accuracy")
        for k in (1, 5, None)
    },
    "contrastive_score": Figure(
        "contrastive",
        1,
        "Largest difference of a latent's mean activation between two opposite stories, in "
        "standard deviations above the mean over latents (CE-Bench's contrastive score).",
        2,
    ),
    "ce_loss_score": Figure(
        "CE loss recovered",
        1,
        "Share of the rise in cross-entropy loss, with zeros at the hook, that the "
        "reconstruction avoids.",
    ),
    "kl_div_score": Figure(
        "KL recovered",
        1,
        "Share of the KL divergence of the next-token distribution, with zeros at the hook, that "
        "the reconstruction avoids.",
    ),
    "stability": Figure(
        "stability",
        1,
        "Cosine of the decoder rows of two seeds, averaged over the best one-to-one match of "
        "the latents that fire, then over pairs of seeds.",
    ),
    "seconds": Figure(
        "training, s",
        0,
        "Time of the whole training of one SAE, with batches and evaluations.",
        0,
    ),
    "group_seconds": Figure(
        "training of the group, s",
        0,
        "Time of the whole training of the SAEs that share the language model's forward passes.",
        0,
    ),
    "step_ms": Figure(
        "step, ms",
        0,
        "Median time of a training step.",
        1,
    ),
    "peak_memory_mib": Figure(
        "peak memory, MiB",
        0,
        "Highest memory in use during training: on a GPU that of torch, else that of the "
        "process, less what it used before.",
        0,
    ),
}
"""The figures in the order of the tables. Other figures come after them."""
NEEDS = {
    **dict.fromkeys(("mcc", "f1", "precision", "recall", "uniqueness"), "synthetic"),
    **dict.fromkeys(("recall_gap", "children_learned"), "synthetic"),
    **dict.fromkeys(("ce_loss_score", "kl_div_score", "dead_window"), "model"),
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
    **{name: "tasks" for name in FIGURES if re.match("probe_.*_(k[0-9]+|raw)$", name)},
    "contrastive_score": "stories",
    "stability": "seeds",
}
"""What a figure needs: synthetic data, a language model, first letters, tasks of sae-probes,
contrastive stories, several seeds, or parents, which synthetic data and first letters have."""


def figure(name: str) -> Figure:
    """Return the display settings of a figure, or default ones for a name not in `FIGURES`."""
    probing = re.fullmatch(r"probe_(auc|accuracy)_k(\d+)", name)
    if name not in FIGURES and probing:
        return _on_tasks(probing[1], int(probing[2]))
    return FIGURES.get(name, Figure(name.replace("_", " "), 0))
