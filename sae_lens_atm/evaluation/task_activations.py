"""The activations of a language model on the last tokens of texts, read as in sae-probes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sae_lens_atm.evaluation.hooked_reading import ModelHook, activations_at

_TOKENS_IN_BATCH = 2048


def last_token_activations(
    model: Any,
    hook: ModelHook,
    texts: Sequence[str],
    max_tokens: int,
    on_texts: Callable[[Sequence[int]], None],
) -> Tensor:
    """Return the activations at a hook, on the last token of each text.

    The model runs up to the hook. Texts of similar length make a batch.

    Args:
        model: the language model with its tokenizer.
        hook: where the activations are read.
        texts: the texts. Each gets a `<bos>`, as from TransformerLens' tokenizers.
        max_tokens: of a longer text, `<bos>` and the last tokens are read.
        on_texts: is called before each batch, with the places of its texts.

    Returns:
        Shape ``(texts, d_in)``, on the CPU, in the dtype of the model.
    """
    rows = [*_rows(model.tokenizer, texts, min(max_tokens, context_of(model)))]
    found: dict[int, Tensor] = {}
    for batch in batches_by_length(rows):
        on_texts(batch)
        of_batch = [rows[i] for i in batch]
        last = activations_at(model, hook, of_batch, [len(row) - 1 for row in of_batch])
        found |= zip(batch, last, strict=True)
    return torch.stack([found[i] for i in range(len(texts))])


def _rows(tokenizer: Any, texts: Sequence[str], most: int) -> Iterator[list[int]]:
    """Yield the tokens of each text; without any, one token."""
    first = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    for tokens in found:
        yield [*first, *tokens[max(len(tokens) - max(most - len(first), 1), 0) :]] or [0]


def batches_by_length(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield the places of rows, the longest first, with at most 2048 tokens in a batch."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    while order:
        size = max(_TOKENS_IN_BATCH // len(rows[order[0]]), 1)
        yield order[:size]
        order = order[size:]


def context_of(model: Any) -> int:
    """Return the largest number of tokens that a model reads."""
    cfg: Any = model.cfg if hasattr(model, "cfg") else model.model.config
    for name in ("n_ctx", "max_position_embeddings"):
        if isinstance(getattr(cfg, name, None), int):
            return getattr(cfg, name)
    return torch.iinfo(torch.int32).max
