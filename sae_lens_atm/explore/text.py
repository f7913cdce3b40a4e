"""Tokens of a language model with their activations: from a cache, or from a fresh pass."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens.util import get_special_token_ids
from torch import Tensor

from sae_lens_atm.data.activation_cache import ActivationCache
from sae_lens_atm.data.cache_writer import whole_contexts
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.language_model import make_store
from sae_lens_atm.explore.reading import Tokens
from sae_lens_atm.training.cached_run import open_cache
from sae_lens_atm.training.run_file import LanguageModelRun

_BATCH = 2048  # tokens that go through an SAE at a time


def tokens_of(run: LanguageModelRun, model: Any, number: int) -> Tokens:
    """Return tokens of a run: of its cache if it has one, or else of its dataset.

    Contexts are taken at even distances from a cache, and from the start of a dataset.

    Args:
        run: the run.
        model: its language model.
        number: about how many tokens.

    Raises:
        SettingsError: the cache is missing or of another model or hook, or there are no tokens.
    """
    contexts = max(number // run.runner.context_size, 1)
    if run.activations is not None:
        return _of_cache(open_cache(run), run.runner.context_size, contexts)
    return _of_dataset(run, model, contexts)


def _of_cache(cache: ActivationCache, size: int, contexts: int) -> Tokens:
    number = min(contexts, cache.contexts)
    chosen = np.linspace(0, cache.contexts - 1, number).astype(np.int64)
    rows = cache.rows(0).astype(np.int64)
    rows = rows[np.isin(rows // size, chosen)]
    places = np.searchsorted(chosen, rows // size) * size + rows % size

    def batches() -> Iterator[tuple[NDArray[Any], Tensor]]:
        for start in range(0, len(rows), _BATCH):
            part = slice(start, start + _BATCH)
            yield places[part], cache.read(rows[part])

    return Tokens(cache.tokens[chosen], len(rows), batches())


def _of_dataset(run: LanguageModelRun, model: Any, contexts: int) -> Tokens:
    cfg = run.runner
    store = whole_contexts(make_store(cfg, model))
    ids: list[Tensor] = []
    for _ in range(contexts):
        try:
            ids.append(store.get_batch_tokens(1, raise_at_epoch_end=True).cpu())
        except StopIteration:
            break
    if not ids:
        raise SettingsError(f"dataset_path {cfg.dataset_path!r} has no context of the run's size")
    tokens = torch.cat(ids)
    keep = torch.zeros_like(tokens, dtype=torch.bool)
    keep[:, slice(*cfg.seqpos_slice)] = True
    excluded = cfg.exclude_special_tokens
    if isinstance(excluded, bool):
        excluded = get_special_token_ids(model.tokenizer) if excluded else []
    keep &= ~torch.isin(tokens, torch.tensor(excluded, dtype=tokens.dtype))

    def batches() -> Iterator[tuple[NDArray[Any], Tensor]]:
        for start in range(0, len(tokens), cfg.store_batch_size_prompts):
            part = slice(start, start + cfg.store_batch_size_prompts)
            places = keep[part].flatten().nonzero().squeeze(1)
            if len(places):
                device = next(model.parameters()).device
                acts = store.get_activations(tokens[part].to(device)).cpu().flatten(0, 1)
                yield places.numpy() + start * tokens.shape[1], acts[places]

    return Tokens(tokens.numpy().astype(np.int32), int(keep.sum()), batches())


def text_of(tokenizer: Any, ids: NDArray[Any]) -> list[str]:
    """Return the text of each token, as it stands in a text. Without a tokenizer, the number."""
    if tokenizer is None:
        return [str(token) for token in ids.tolist()]
    return [str(tokenizer.decode([token])) for token in ids.tolist()]
