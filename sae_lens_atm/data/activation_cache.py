"""Activations of a language model on disk: read them in random order, without the model.

A cache is a folder with a dataset in SAELens' format for cached activations: one row for each
context, with the activations at the hook and the tokens. It also has `cache.json`, which says what
was cached, and a manifest with sizes and checksums. `cache_writer` writes it.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sae_lens import LanguageModelSAERunnerConfig
from torch import Tensor

from sae_lens_atm.data.model_identity import model_identity, source_identity
from sae_lens_atm.errors import CheckpointError, SettingsError, one_line
from sae_lens_atm.files import manifest_mismatch, read_json, read_manifest, write_json

FACTS_FILENAME = "cache.json"
TOKENS = "token_ids"
POSITION_FILENAME = "cached_batches.json"
"""The position in a cache, in a checkpoint."""
LETTERS_FOLDER, TASKS_FOLDER = "first-letters", "sae-probes"
"""Folders beside a cache, in which evaluations store what they read."""
DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class CacheSettings:
    """The key `activations` of a run, comparison or sweep file.

    Args:
        cache: the folder of the cache.
        tokens: number of tokens to cache. None takes the tokens of the evaluation and of training.
            A longer training reads the cache several times, each time in another order.
        dtype: `float16` or `float32`.
    """

    cache: str
    tokens: int | None = None
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if not self.cache:
            raise ValueError("cache must be a folder, got ''")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens must be above 0, got {self.tokens}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def folder(self) -> Path:
        """The folder of the cache."""
        return Path(self.cache).expanduser()


def cache_facts(cfg: LanguageModelSAERunnerConfig[Any]) -> dict[str, Any]:
    """Return what determines the content of a cache: model, hook, dataset and contexts.

    Not among them are `seqpos_slice` and `exclude_special_tokens`. A cache holds all positions,
    and both are applied when it is read.
    """
    return {
        **model_identity(cfg),
        "d_in": cfg.sae.d_in,
        "dataset_path": source_identity(cfg.dataset_path),
        "context_size": cfg.context_size,
        "prepend_bos": cfg.prepend_bos,
        "sequence_separator_token": cfg.sequence_separator_token,
        "disable_concat_sequences": cfg.disable_concat_sequences,
        "use_chat_formatting": cfg.use_chat_formatting,
    }


def check_facts(
    folder: Path, stored: dict[str, Any], cfg: LanguageModelSAERunnerConfig[Any]
) -> None:
    """Check that a cache holds the activations which a run reads.

    Raises:
        SettingsError: it holds others. The message names the first setting that differs.
    """
    for name, value in json.loads(json.dumps(cache_facts(cfg))).items():
        if stored.get(name) != value:
            name = f"sae.{name}" if name == "d_in" else name
            raise SettingsError(
                f"activations.cache {folder} was made with another {name} "
                f"({stored.get(name)!r}, this run has {value!r}): choose another folder"
            )


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the content of `cache.json`, empty if there is no such file.

    Raises:
        SettingsError: it is damaged.
    """
    try:
        facts: Any = read_json(folder / FACTS_FILENAME)
    except (OSError, ValueError) as error:
        raise SettingsError(f"activations.cache {folder} is damaged: {one_line(error)}") from error
    needed = {"key": dict, "contexts": int, "contexts_per_file": int, "special_tokens": list}
    if facts and not (
        isinstance(facts, dict) and all(isinstance(facts.get(k), t) for k, t in needed.items())
    ):
        raise SettingsError(
            f"activations.cache {folder} is damaged ({FACTS_FILENAME}): remove it and cache again"
        )
    return cast(dict[str, Any], facts)


def held_out_contexts(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    """Return how many contexts at the start of the dataset are kept for the evaluation."""
    prompts = cfg.eval_batch_size_prompts or cfg.store_batch_size_prompts
    return max(cfg.n_eval_batches, 1) * prompts


class ActivationCache:
    """A complete cache, opened for reading. The activations stay on disk (memory-mapped).

    Args:
        folder: the folder.
        cfg: the run that reads it.

    Raises:
        SettingsError: there is no complete cache, it is damaged, or it is of another model, hook
            or dataset.
    """

    def __init__(self, folder: Path, cfg: LanguageModelSAERunnerConfig[Any]) -> None:
        self.folder = folder
        self.facts = _checked(folder, cfg)
        self._cfg = cfg
        table = Dataset.load_from_disk(str(folder)).data
        shape = (-1, cfg.context_size, cfg.sae.d_in)
        self._parts: list[NDArray[Any]] = [
            # Two levels of lists of fixed length around the values, which are not copied.
            chunk.storage.flatten().flatten().to_numpy(zero_copy_only=True).reshape(shape)
            for chunk in cast(Any, table.column(cfg.hook_name)).chunks
        ]
        tokens = cast(Any, table.column(TOKENS)).chunks
        self._tokens = [c.flatten().to_numpy().reshape(-1, cfg.context_size) for c in tokens]
        self._ends = np.cumsum([len(part) for part in self._parts])

    @property
    def contexts(self) -> int:
        """Number of contexts."""
        return int(self._ends[-1])

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """The tokens, shape ``(contexts, context_size)``."""
        return np.concatenate(self._tokens)

    def rows(self, first: int, last: int | None = None) -> NDArray[Any]:
        """Return the numbers of the activations that a run reads, in the order of the text.

        Positions outside of `seqpos_slice`, and the tokens of `exclude_special_tokens`, are left
        out. The activation at position p of context c has the number ``c * context_size + p``.

        Args:
            first: the first context.
            last: the context at which to stop.
        """
        tokens = self.tokens[first:last]
        keep = np.zeros(tokens.shape, dtype=bool)
        keep[:, slice(*self._cfg.seqpos_slice)] = True
        excluded = self._excluded_tokens()
        if excluded:
            keep &= ~np.isin(tokens, excluded)
        rows = np.flatnonzero(keep) + first * self._cfg.context_size
        return rows.astype(np.int32) if self.tokens.size < 2**31 else rows

    def _excluded_tokens(self) -> list[int]:
        setting = self._cfg.exclude_special_tokens
        if isinstance(setting, list):
            return setting
        return list(self.facts["special_tokens"]) if setting else []

    def read(self, rows: NDArray[Any]) -> Tensor:
        """Return activations by their numbers, float32, shape ``(len(rows), d_in)``."""
        out = np.empty((len(rows), self._cfg.sae.d_in), dtype=np.float32)
        order = np.argsort(rows)
        contexts, positions = np.divmod(rows[order], self._cfg.context_size)
        ends = np.searchsorted(contexts, self._ends)
        first = 0
        for part, start, end in zip(self._parts, [0, *self._ends], ends, strict=False):
            if first < end:
                out[order[first:end]] = part[contexts[first:end] - start, positions[first:end]]
            first = end
        return torch.from_numpy(out)


def _checked(folder: Path, cfg: LanguageModelSAERunnerConfig[Any]) -> dict[str, Any]:
    facts = read_facts(folder)
    try:
        is_complete = read_manifest(folder) is not None
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise SettingsError(f"activations.cache {folder} is damaged: {reason}") from error
    if facts:
        check_facts(folder, facts["key"], cfg)
    if not facts or not is_complete:
        what = "an incomplete cache" if facts else "no cache"
        raise SettingsError(
            f"activations.cache {folder} holds {what}: run `sae-lens-atm cache` with this file"
        )
    problem = manifest_mismatch(folder, checksums=False)
    if problem is not None:
        raise SettingsError(
            f"activations.cache {folder} is damaged ({problem}): remove it and cache again"
        )
    return facts


class CachedBatches(Iterator[Tensor]):
    """Training batches from a cache, without end, in the place of SAELens' activation store.

    Each pass over the cache has its own random order over all activations, which depends on the
    seed and the number of the pass alone.

    Args:
        cache: the cache.
        rows: numbers of the activations to train on.
        batch_size: activations in a batch.
        seed: seed of the orders.
        position: number of batches that were served before.
        own_rows: returns the part of a batch that this process trains on. None is all of it.
    """

    def __init__(
        self,
        cache: ActivationCache,
        rows: NDArray[Any],
        batch_size: int,
        seed: int,
        position: int = 0,
        own_rows: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if len(rows) < batch_size:
            raise SettingsError(
                f"activations.cache {cache.folder} holds {len(rows):,} activations for training, "
                f"fewer than a batch of {batch_size:,}: cache more tokens"
            )
        self._cache, self._rows, self._batch_size, self._seed = cache, rows, batch_size, seed
        self.position, self._own_rows = position, own_rows
        self._order: tuple[int, NDArray[Any]] | None = None

    def __next__(self) -> Tensor:
        first = self.position * self._batch_size
        passes, place = divmod(first, len(self._rows))
        rows = self._in_order(passes)[place : place + self._batch_size]
        if len(rows) < self._batch_size:
            rest = self._in_order(passes + 1)[: self._batch_size - len(rows)]
            rows = np.concatenate([rows, rest])
        self.position += 1
        if self._own_rows is not None:
            rows = self._own_rows(torch.from_numpy(rows)).numpy()
        return self._cache.read(rows)

    def _in_order(self, number: int) -> NDArray[Any]:
        if self._order is None or self._order[0] != number:
            shuffled = np.random.default_rng((self._seed, number)).permutation(self._rows)
            self._order = (number, shuffled)
        return self._order[1]

    def save_to_checkpoint(self, folder: str | Path) -> None:
        """Write the number of served batches, as SAELens' store writes its position."""
        write_json(Path(folder) / POSITION_FILENAME, {"batches": self.position})

    def load_from_checkpoint(self, folder: str | Path) -> None:
        """Restore the number of served batches.

        Raises:
            CheckpointError: the run of the checkpoint did not read a cache.
        """
        state = read_json(Path(folder) / POSITION_FILENAME)
        if "batches" not in state:
            raise CheckpointError(
                f"cannot resume: the run of {folder} did not read cached activations, "
                "remove `activations` from this run"
            )
        self.position = int(state["batches"])
