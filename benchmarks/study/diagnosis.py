"""What masks and pressure do on a real language model: numbers, a picture, and pairs to judge.

The first argument is the folder of a run of ATM that kept its last checkpoint. The second is the
run file, whose activations are read again. The script writes into the folder `output`:

- `diagnosis.json`: importance against the threshold, masking by frequency, and figures of all pairs
  of child and parent that training found;
- `diagnosis.png`: a picture of these;
- `pairs.txt`: some pairs, drawn at random, with the strongest contexts of both latents. A person
  judges them.

    python benchmarks/study/diagnosis.py my-run my-run.yaml folder
"""

from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.explore.examples import Amount, Windows, find_examples
from sae_lens_atm.explore.found_parents import found_in_training
from sae_lens_atm.explore.hierarchy import Pairs, describe_pairs, find_pair_examples
from sae_lens_atm.explore.latents import DENSE
from sae_lens_atm.explore.reading import Reading, Tokens, read_tokens
from sae_lens_atm.explore.text import text_of, tokens_of
from sae_lens_atm.files import to_json
from sae_lens_atm.hub.loading import load_sae
from sae_lens_atm.training.latent_history import read_latent_history
from sae_lens_atm.training.phases import ignore_phase
from sae_lens_atm.training.run_file import LanguageModelRun, load_run

mpl.use("Agg")
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
FREQUENCIES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Bounds of the groups of latents by frequency. The first group never fires."""
DUPLICATE = 0.7
"""Cosine of decoder rows from which a pair counts as near-duplicates."""
TOGETHER = 2.0
"""Multiple of the parent's frequency from which a pair counts as firing together."""
AROUND = 8  # tokens on each side of the token in question


def masking(history: dict[str, Tensor], frequency: NDArray[Any]) -> dict[str, Any]:
    """Return importance against the threshold over training, and masking by frequency."""
    importance = history["importance"].numpy()
    threshold = history["threshold"].numpy()
    probability = history["mask_probability"].float().numpy()
    masked = probability.max(1) > 0  # the steps with masks
    mean = probability[masked].mean(0) if masked.any() else np.zeros(len(frequency))
    groups = np.digitize(frequency, FREQUENCIES[1:-1]) + (frequency > 0)
    alive = frequency > 0
    return {
        "steps": history["steps"].tolist(),
        "threshold": threshold.tolist(),
        "importance": np.quantile(importance, QUANTILES, axis=1).T.tolist(),
        "above_threshold": (importance >= threshold[:, None]).mean(1).tolist(),
        "mean_mask_probability": float(mean.mean()),
        "sd_of_mask_probability": float(mean.std()),
        "rank_correlation_with_frequency": float(
            cast(Any, spearmanr(mean[alive], frequency[alive]))[0]
        ),
        "by_frequency": [
            {
                "up_to": bound,
                "latents": int((groups == group).sum()),
                "mask_probability": float(mean[groups == group].mean())
                if (groups == group).any()
                else None,
            }
            for group, bound in enumerate(FREQUENCIES)
        ],
    }


def pair_figures(pairs: Pairs, frequency: NDArray[Any]) -> dict[str, Any]:
    """Return how many pairs there are of each kind. A pair can be of several kinds."""
    of_parent, of_child = frequency[pairs.parent], frequency[pairs.child]
    kinds = {
        "dense_parent": of_parent > DENSE,
        "duplicate": pairs.cosine >= DUPLICATE,
        "together": pairs.lift >= TOGETHER,
        "cosine_below_0.1": pairs.cosine < 0.1,
        "child_more_frequent": of_child > of_parent,
        "dead_child": of_child == 0,
    }
    return {
        "pairs": len(pairs.child),
        "children": len(set(pairs.child.tolist())),
        "parents": len(set(pairs.parent.tolist())),
        "dense_latents": int((frequency > DENSE).sum()),
        **{name: int(where.sum()) for name, where in kinds.items()},
        "median_cosine": float(np.median(pairs.cosine)) if len(pairs.cosine) else None,
        "median_multiple_of_chance": float(np.median(pairs.lift)) if len(pairs.lift) else None,
    }


def draw(
    found: dict[str, Any], pairs: Pairs, frequency: NDArray[Any], mean: NDArray[Any]
) -> Figure:
    """Draw importance over training, masking by frequency, and the pairs."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    curves = np.array(found["importance"])
    for low, high, shade in ((0, 4, 0.2), (1, 3, 0.35)):
        left.fill_between(
            found["steps"], curves[:, low], curves[:, high], alpha=shade, color="#1f77b4", lw=0
        )
    left.plot(found["steps"], curves[:, 2], color="#1f77b4", label="median latent")
    left.plot(found["steps"], found["threshold"], "--", color="#d62728", label="threshold")
    left.set(yscale="log", xlabel="step", ylabel="importance", title="importance and threshold")
    left.set_ylim(bottom=max(float(curves[curves > 0].min(initial=1)), 1e-4))
    left.legend()
    alive = frequency > 0
    middle.scatter(frequency[alive], mean[alive], s=5, color="#1f77b4")
    middle.set(
        xscale="log", xlabel="frequency", ylabel="mean probability", title="masking of latents"
    )
    right.scatter(frequency[pairs.parent], pairs.lift.clip(1e-2), s=4, color="#1f77b4")
    right.axhline(1, color="grey", lw=0.8)
    right.axvline(DENSE, color="#d62728", ls="--", lw=0.8)
    right.set(
        xscale="log",
        yscale="log",
        xlabel="frequency of the parent",
        ylabel="fires with the child, multiples of chance",
        title="pairs of child and parent",
    )
    return figure


class _Text:
    """The tokens that were read, as text."""

    def __init__(self, tokens: Tokens, tokenizer: Any) -> None:
        self._ids, self._tokenizer = tokens.ids, tokenizer

    def around(self, place: int) -> str:
        size = self._ids.shape[1]
        row, column = divmod(place, size)
        start, end = max(column - AROUND, 0), min(column + AROUND + 1, size)
        parts = text_of(self._tokenizer, self._ids[row, start:end])
        at = column - start
        parts[at] = f" «{parts[at].strip()}» "
        return " ".join("".join(parts).split()).replace("`", "'")


def contexts_of(windows: Windows, which: range, text: _Text) -> list[str]:
    """Return a line for each window."""
    return [f"  - {text.around(int(windows.places[window]))}" for window in which]


def pairs_to_judge(
    reading: Reading, pairs: Pairs, text: _Text, size: int, number: int, seed: int
) -> str:
    """Return some pairs as text, with the strongest contexts of parent and child."""
    alive = np.flatnonzero(np.diff(reading.acts.indptr)[pairs.child] > 0)
    chosen = np.sort(np.random.default_rng(seed).permutation(alive)[:number])
    some = Pairs._make(column[chosen] for column in pairs)
    examples = find_examples(reading, size, Amount(top=5, part=0, pair=2), seed)
    beside = find_pair_examples(reading, some, size, Amount(top=0, part=0, pair=2))
    frequency = reading.signals.frequency
    lines: list[str] = []
    for index, (child, parent) in enumerate(zip(some.child, some.parent, strict=True)):
        lines.append(
            f"## {index + 1}. Parent {parent}, child {child}\n\n"
            f"Frequency {frequency[parent]:.4f} and {frequency[child]:.4f}, cosine "
            f"{some.cosine[index]:.2f}; the parent fires on {some.together[index]:.0%} of the "
            f"child's tokens, {some.lift[index]:.1f} times chance.\n"
        )
        for name, latent in (("parent", parent), ("child", child)):
            which = range(examples.starts[latent], examples.starts[latent + 1])
            lines += [f"- {name}", *contexts_of(examples.windows, which, text)]
        which = range(beside.starts[index], beside.starts[index + 1])
        missed = [window for window in which if beside.kinds[window] < 2]
        if missed:
            lines += ["- child without the parent"]
            lines += [
                line for w in missed for line in contexts_of(beside.child, range(w, w + 1), text)
            ]
        lines.append("")
    return "\n".join(lines)


def main(
    folder: Path,
    config: Path,
    output: Path,
    tokens: int = 200_000,
    pairs: int = 50,
    seed: int = 0,
) -> None:
    """Read the activations once, and write what was found."""
    run = load_run(config)
    assert isinstance(run, LanguageModelRun)
    history, parents = read_latent_history(folder), found_in_training(str(folder))
    if history is None or parents is None:
        raise SystemExit(f"{folder} has no record of its latents, or no checkpoint with parents")
    model = load_language_model(run.runner)
    read = tokens_of(run, model, tokens)
    reading = read_tokens([load_sae(str(folder))], read, ignore_phase)[0]
    frequency = reading.signals.frequency.numpy()
    found = describe_pairs(reading, parents.parents, choose=False)
    of_masks = masking(history, frequency)
    probability = history["mask_probability"].float().numpy()
    mean = probability[probability.max(1) > 0].mean(0)
    content = {
        "model": Path(run.runner.model_name).name,
        "hook": run.runner.hook_name,
        "tokens": reading.rows,
        "d_sae": len(frequency),
        "l0": reading.l0,
        "masks": of_masks,
        "pairs": pair_figures(found, frequency),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "diagnosis.json").write_text(to_json(content) + "\n")
    draw(of_masks, found, frequency, mean).savefig(output / "diagnosis.png", dpi=110)
    text = _Text(read, model.tokenizer)
    size = run.runner.context_size
    (output / "pairs.txt").write_text(pairs_to_judge(reading, found, text, size, pairs, seed))


if __name__ == "__main__":
    typer.run(main)
