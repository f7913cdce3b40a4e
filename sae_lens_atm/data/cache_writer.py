"""Write the activations of a language model to disk, once for all SAEs that read them."""

import json
import math
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Array2D, Dataset, Features, Sequence, Value
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids

from sae_lens_atm.data.activation_cache import (
    FACTS_FILENAME,
    LETTERS_FOLDER,
    TASKS_FOLDER,
    TOKENS,
    CacheSettings,
    cache_facts,
    check_facts,
    held_out_contexts,
    read_facts,
)
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.files import (
    MANIFEST_FILENAME,
    check_writable,
    existing_parent,
    hash_of,
    read_json,
    saving,
    write_json,
    write_manifest,
    write_text,
)

_FILE_BYTES = 2**26  # a cache that is stopped loses at most one file
"""Size of a file of the cache, about. It is held twice in memory while it is written."""
_TOKEN_BYTES = 4


class CachePlan(NamedTuple):
    """The size of a cache."""

    contexts: int
    contexts_per_file: int
    bytes: int

    @property
    def files(self) -> int:
        """Number of files with activations."""
        return math.ceil(self.contexts / self.contexts_per_file)

    def file_name(self, index: int) -> str:
        """Return the name of a file, as SAELens names them."""
        return f"data-{index:05d}-of-{self.files:05d}.arrow"


def plan_cache(cfg: LanguageModelSAERunnerConfig[Any], settings: CacheSettings) -> CachePlan:
    """Return how many contexts a cache gets and which size it has."""
    kept = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    if settings.tokens is None:
        contexts = held_out_contexts(cfg) + math.ceil(cfg.training_tokens / kept)
    else:
        contexts = max(settings.tokens // cfg.context_size, 1)
    value_bytes = np.dtype(settings.dtype).itemsize
    context_bytes = cfg.context_size * (cfg.sae.d_in * value_bytes + _TOKEN_BYTES)
    # Whole batches of the model, so that its batches do not depend on where a file ends.
    batch = cfg.store_batch_size_prompts
    per_file = max(_FILE_BYTES // context_bytes // batch, 1) * batch
    return CachePlan(contexts, per_file, contexts * context_bytes)


def check_cache_folder(
    cfg: LanguageModelSAERunnerConfig[Any], settings: CacheSettings, plan: CachePlan
) -> int:
    """Check that a cache can be written or resumed. Return the number of files that exist.

    Raises:
        SettingsError: the folder holds something else, or the disk is too small.
    """
    folder = settings.folder
    if not is_complete(folder):  # a complete cache may be read-only
        check_writable("activations.cache", folder)
    facts = read_facts(folder)
    if facts:
        check_facts(folder, facts["key"], cfg)
        if facts["contexts"] != plan.contexts:
            begun, asked = (n * cfg.context_size for n in (facts["contexts"], plan.contexts))
            raise SettingsError(
                f"activations.cache {folder} was begun with another number of tokens ({begun:,}, "
                f"this file has {asked:,}): set activations.tokens: {begun}, or another folder"
            )
        for name, value in _size_facts(plan, settings).items():
            if facts.get(name) != value:
                raise SettingsError(
                    f"activations.cache {folder} was begun with another {name} "
                    f"({facts.get(name)}, this file has {value}): choose another folder"
                )
    elif folder.is_dir() and any(not _may_be_beside(p.name) for p in folder.iterdir()):
        raise SettingsError(f"activations.cache {folder} is not empty: choose another folder")
    done = sum((folder / plan.file_name(i)).exists() for i in range(plan.files))
    needed = plan.bytes * (plan.files - done) // plan.files
    free = shutil.disk_usage(existing_parent(folder)).free
    if needed > free:
        raise SettingsError(
            f"activations.cache {folder} needs {needed / 2**30:.1f} GiB, and the disk has "
            f"{free / 2**30:.1f} GiB free: set fewer activations.tokens or another folder"
        )
    return done


def _may_be_beside(name: str) -> bool:
    """Return whether evaluations, or a stopped process, leave files of this name in the folder."""
    return name.startswith(".") or name in (LETTERS_FOLDER, TASKS_FOLDER)


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds a complete cache. `ActivationCache` checks it further."""
    return (folder / MANIFEST_FILENAME).exists()


def write_cache(
    cfg: LanguageModelSAERunnerConfig[Any],
    settings: CacheSettings,
    store: ActivationsStore,
) -> Iterator[int]:
    """Write a cache, and yield the number of contexts that are done after each model batch.

    Each file is complete or absent. A stopped cache goes on with the first file that is absent.

    Args:
        cfg: the run whose activations are cached.
        settings: its key `activations`.
        store: SAELens' store of the run, which has served nothing yet.

    Raises:
        SettingsError: activations are too large for the dtype, or the dataset is too short.
        SaveError: the disk is full, for example. Complete files stay.
    """
    folder, plan = settings.folder, plan_cache(cfg, settings)
    check_cache_folder(cfg, settings, plan)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = getattr(store.model, "tokenizer", None)
    facts = {
        "key": cache_facts(cfg),
        **_size_facts(plan, settings),
        "special_tokens": [] if tokenizer is None else get_special_token_ids(tokenizer),
        "versions": {name: version(name) for name in ("sae-lens", "transformers", "torch")},
    }
    write_json(folder / FACTS_FILENAME, facts)
    read = 0  # contexts that were read from the dataset
    for index in range(plan.files):
        first = index * plan.contexts_per_file
        number = min(plan.contexts_per_file, plan.contexts - first)
        if (folder / plan.file_name(index)).exists():
            yield first + number
            continue
        for _ in islice(store.iterable_sequences, first - read):
            pass
        values = np.empty((number, cfg.context_size, cfg.sae.d_in), dtype=settings.dtype)
        tokens = np.empty((number, cfg.context_size), dtype=np.int32)
        for start in range(0, number, cfg.store_batch_size_prompts):
            end = min(start + cfg.store_batch_size_prompts, number)
            part = _next_tokens(store, end - start, first + start, plan.contexts, cfg.dataset_path)
            # `seqpos_slice` of the store is all positions, see `whole_contexts`.
            values[start:end] = _stored(store.get_activations(part), settings)
            tokens[start:end] = part.cpu().numpy()
            yield first + end
        read = first + number
        with saving(folder):
            _write_file(folder, plan.file_name(index), cfg, values, tokens)
    with saving(folder):
        _finish(folder, plan)


def whole_contexts(store: ActivationsStore) -> ActivationsStore:
    """Let a store return the activations of all positions."""
    store.seqpos_slice = (None,)
    return store


def _size_facts(plan: CachePlan, settings: CacheSettings) -> dict[str, Any]:
    return {
        "contexts": plan.contexts,
        "contexts_per_file": plan.contexts_per_file,
        "dtype": settings.dtype,
    }


def _next_tokens(
    store: ActivationsStore, number: int, done: int, wanted: int, dataset: str
) -> torch.Tensor:
    try:
        return store.get_batch_tokens(number, raise_at_epoch_end=True)
    except StopIteration as error:
        size = store.context_size
        raise SettingsError(
            f"dataset_path {dataset!r} has {done * size:,} to {(done + number) * size:,} tokens, "
            f"and the cache needs {wanted * size:,}: set fewer activations.tokens"
        ) from error


def _stored(activations: torch.Tensor, settings: CacheSettings) -> Any:
    values = activations.cpu().to(getattr(torch, settings.dtype))
    if not values.isfinite().all():
        largest = activations.abs().max().item()
        remedy = "set activations.dtype: float32" if math.isfinite(largest) else "check the model"
        raise SettingsError(
            f"an activation is {largest:g}, which {settings.dtype} cannot hold: {remedy}"
        )
    return values.numpy()


def _write_file(
    folder: Path, name: str, cfg: LanguageModelSAERunnerConfig[Any], values: Any, tokens: Any
) -> None:
    """Write one file of the dataset aside, then rename it."""
    features = Features(
        {
            cfg.hook_name: Array2D(values.shape[1:], str(values.dtype)),
            TOKENS: Sequence(Value("int32"), length=cfg.context_size),
        }
    )
    content = {cfg.hook_name: values, TOKENS: tokens}
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        Dataset.from_dict(content, features=features).save_to_disk(partial, num_shards=1)
        shutil.copy(partial / "dataset_info.json", folder)
        (partial / "data-00000-of-00001.arrow").replace(folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _finish(folder: Path, plan: CachePlan) -> None:
    names = [plan.file_name(i) for i in range(plan.files)]
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": hash_of([read_json(folder / FACTS_FILENAME), names]),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_text(folder / "state.json", json.dumps(state))
    write_manifest(folder)
