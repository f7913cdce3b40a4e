"""Export of an SAE's latents in the format of SAEDashboard, which Neuronpedia imports.

The files are those of SAEDashboard's runner. ``batch-0.json``, ``batch-1.json``, ... hold up to
`BATCH` latents each. ``skipped_indexes.json`` names the latents that never fire.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.explore.content import Described, Material
from sae_lens_atm.explore.examples import PARTS, TOP, WINDOW, Amount, Examples, find_examples
from sae_lens_atm.explore.latents import Latents
from sae_lens_atm.explore.promoted import Promoted
from sae_lens_atm.explore.reading import Reading
from sae_lens_atm.files import check_new_folder
from sae_lens_atm.training.phases import OnPhase, Phase
from sae_lens_atm.training.run_file import LanguageModelRun, Run, SyntheticRun

BATCH = 128
"""Largest number of latents in a file."""
_AMOUNT = Amount(20, 5, 0)
_LOGIT_BINS = 50
_DIGITS = 3
_DIMENSIONS = 3
"""Number of dimensions of the activations that are named for each decoder row."""
_NOT_MEASURED = ("correlated_neurons", "correlated_features")
_IS_TOP = {"bin_min": -1, "bin_contains": -1}
"""SAEDashboard marks the strongest contexts with these values."""


class Source(NamedTuple):
    """What Neuronpedia calls a source: an SAE, its model and its data."""

    name: str
    model: str
    hook_name: str
    dataset: str


class LogitHistograms:
    """Histograms of the logits that each decoder row adds."""

    def __init__(self) -> None:
        self.heights: list[list[int]] = []
        self.values: list[list[float]] = []

    def add(self, logits: Tensor) -> None:
        """Add rows of logits, shape ``(rows, vocabulary)``."""
        for row in logits:
            low, high = (float(value) for value in row.aminmax())
            self.heights.append(torch.histc(row, _LOGIT_BINS).int().tolist())
            self.values.append(_middles(low, high, _LOGIT_BINS))


def check_export(folder: Path, run: Run) -> None:
    """Refuse synthetic data, and a folder with files, which would mix two exports."""
    if isinstance(run, SyntheticRun):
        raise SettingsError(
            "--neuronpedia shows the tokens of a language model, and the data is synthetic"
        )
    check_new_folder("--neuronpedia", folder)


def export(
    folder: Path,
    name: str,
    run: Run,
    described: Described,
    material: Material,
    logits: LogitHistograms,
    on_phase: OnPhase,
) -> None:
    """Write what a page shows of an SAE, see `write_neuronpedia`."""
    assert isinstance(run, LanguageModelRun)
    assert material.ids is not None
    cfg, dataset = run.runner, Path(run.runner.dataset_path)
    source = Source(
        name,
        Path(cfg.model_name).name,
        cfg.hook_name,
        dataset.name if dataset.exists() else cfg.dataset_path,
    )
    texts = dict(zip(material.strings.used.tolist(), material.texts, strict=True))
    found = described.reading, described.latents, described.promoted
    write_neuronpedia(folder, source, *found, logits, material.ids, texts, on_phase)


def write_neuronpedia(
    folder: Path,
    source: Source,
    reading: Reading,
    latents: Latents,
    promoted: Promoted | None,
    logits: LogitHistograms,
    ids: NDArray[np.int32],
    texts: dict[int, str],
    on_phase: OnPhase,
) -> None:
    """Write the files.

    Args:
        folder: a new or an empty folder.
        source: the names of the SAE, its model and its data.
        reading: what the SAE does on the tokens.
        latents: the figures of the latents.
        promoted: the tokens whose logits each row changes most; None leaves them out.
        logits: histograms of all logits, without rows if `promoted` is None.
        ids: the tokens, shape ``(contexts, context_size)``.
        texts: the texts of the tokens in `ids` and `promoted`.
        on_phase: is called before each file.
    """
    alive = np.flatnonzero(latents.maximum)
    dead = np.flatnonzero(latents.maximum == 0)
    names = {"model_id": source.model, "layer": layer_of(source.hook_name), "sae_set": source.name}
    skipped = names | {"layer": str(names["layer"]), "skipped_indexes": dead.tolist()}
    common = {
        "n_prompts_total": len(np.unique(reading.places // ids.shape[1])),
        "n_tokens_in_prompt": ids.shape[1],
        "dataset": source.dataset,
        "decoder_weights_dist": [],
        "vector": [],
    } | {
        f"{name}_{figure}": [] for name in _NOT_MEASURED for figure in ("indices", "l1", "pearson")
    }
    examples = find_examples(reading, ids.shape[1], _AMOUNT)
    partial = folder.with_name(f".{folder.name}.partial")  # a part looks like the whole
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write(partial / "skipped_indexes.json", skipped)
    for number, start in enumerate(range(0, len(alive), BATCH)):
        on_phase(Phase("writing for Neuronpedia", start, len(alive), "latents"))
        features = [
            {"feature_index": latent}
            | _aligned(reading.decoder[latent])
            | _promoted(promoted, logits, latent, texts)
            | _histogram(latents, latent)
            | {"activations": list(_contexts(reading, examples, latent, ids, texts))}
            | common
            for latent in alive[start : start + BATCH].tolist()
        ]
        _write(
            partial / f"batch-{number}.json", names | {"sae_id_suffix": None, "features": features}
        )
    if folder.exists():
        folder.rmdir()  # it is empty
    partial.rename(folder)
    on_phase(Phase("writing for Neuronpedia", len(alive), len(alive), "latents"))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def layer_of(hook_name: str) -> int:
    """Return the number in a hook's name, as in ``blocks.3.hook_resid_post``; 0 without one."""
    found = re.search(r"\.(\d+)(\.|$)", hook_name)
    return int(found.group(1)) if found else 0


def _middles(low: float, high: float, bins: int) -> list[float]:
    edges = np.linspace(low, high, bins + 1)
    return _rounded((edges[:-1] + edges[1:]) / 2)


def _rounded(values: Any) -> list[float]:
    return [round(float(value), _DIGITS) for value in values]


def _aligned(row: Tensor) -> dict[str, Any]:
    """Return the dimensions with the largest components, and their shares of the L1 norm."""
    best = row.topk(min(_DIMENSIONS, len(row)))
    shares = best.values.abs() / row.abs().sum().clamp(min=1e-30)
    return {
        "neuron_alignment_indices": best.indices.tolist(),
        "neuron_alignment_values": _rounded(best.values),
        "neuron_alignment_l1": _rounded(shares),
    }


def _promoted(
    promoted: Promoted | None, logits: LogitHistograms, latent: int, texts: dict[int, str]
) -> dict[str, Any]:
    if promoted is None:
        names = ("pos_str", "pos_values", "neg_str", "neg_values")
        return {name: [] for name in (*names, *_LOGITS)}
    return {
        "pos_str": [texts[token] for token in promoted.tokens[latent].tolist()],
        "pos_values": _rounded(promoted.logits[latent]),
        "neg_str": [texts[token] for token in promoted.lowest_tokens[latent].tolist()],
        "neg_values": _rounded(promoted.lowest_logits[latent]),
        _LOGITS[0]: logits.heights[latent],
        _LOGITS[1]: logits.values[latent],
    }


_LOGITS = ("logits_hist_data_bar_heights", "logits_hist_data_bar_values")


def _histogram(latents: Latents, latent: int) -> dict[str, Any]:
    heights = latents.histogram[latent]
    return {
        "frac_nonzero": float(latents.frequency[latent]),
        "freq_hist_data_bar_heights": heights.tolist(),
        "freq_hist_data_bar_values": _middles(0, float(latents.maximum[latent]), len(heights)),
    }


def _contexts(
    reading: Reading,
    examples: Examples,
    latent: int,
    ids: NDArray[np.int32],
    texts: dict[int, str],
) -> Iterator[dict[str, Any]]:
    """Yield the contexts of a latent: the strongest, then some of each fifth of the activations."""
    fires, acts = reading.column(latent)
    where = reading.places[fires]
    bounds = [(float(part[0]), float(part[-1])) for part in _parts(acts)]
    shown = slice(examples.starts[latent], examples.starts[latent + 1])
    size = ids.shape[1]
    for place, group in zip(
        examples.windows.places[shown].tolist(), examples.groups[shown].tolist(), strict=True
    ):
        first = place // size * size
        start, end = max(place - WINDOW, first), min(place + WINDOW + 1, first + size)
        values = np.zeros(end - start, np.float32)
        part = slice(*np.searchsorted(where, [start, end]))
        values[where[part] - start] = acts[part]
        if group == TOP:
            bin_of = _IS_TOP | {"bin_max": round(float(acts.max()), _DIGITS)}
        else:
            low, high = _rounded(bounds[group - 1])
            bin_of = {"bin_min": low, "bin_max": high, "bin_contains": 1 / PARTS}
        tokens = ids.ravel()[start:end].tolist()
        yield bin_of | {
            "tokens": [texts[token] for token in tokens],
            "values": _rounded(values),
            "qualifying_token_index": place - start,
        }


def _parts(acts: NDArray[np.float32]) -> Sequence[NDArray[np.float32]]:
    return [part for part in np.array_split(np.sort(acts), PARTS) if len(part)]
