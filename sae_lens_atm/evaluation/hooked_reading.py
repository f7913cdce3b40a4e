"""Read the activations of a language model at a hook."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.util import extract_stop_at_layer_from_tlens_hook_name
from torch import Tensor
from typing_extensions import Self


class ModelHook(NamedTuple):
    """Where and how the activations of a model are read."""

    name: str
    head_index: int | None = None
    model_kwargs: Mapping[str, Any] = {}
    autocast: bool = False
    """Whether the model computes in bfloat16 under autocast."""

    @classmethod
    def of(cls, run: LanguageModelSAERunnerConfig[Any]) -> Self:
        """Return the hook of a run."""
        return cls(run.hook_name, run.hook_head_index, run.model_kwargs, run.autocast_lm)


def activations_at(
    model: Any, hook: ModelHook, rows: Sequence[Sequence[int]], places: Sequence[int]
) -> Tensor:
    """Return the activation of each row at one of its tokens, ``(rows, d_in)``, on the CPU.

    The model runs up to the hook.

    Args:
        model: the language model.
        hook: where the activations are read.
        rows: the tokens of each text.
        places: for each row, the place of a token.
    """
    stream = _stream(model, hook, rows)
    at = torch.tensor(places, device=stream.device)
    return stream[torch.arange(len(at), device=stream.device), at].cpu()


def activations_of(model: Any, hook: ModelHook, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the activations of each row at all its tokens, ``(tokens, d_in)``, on the CPU.

    The model runs up to the hook.

    Args:
        model: the language model.
        hook: where the activations are read.
        rows: the tokens of each text.
    """
    stream = _stream(model, hook, rows).cpu()
    return [part[: len(row)].clone() for part, row in zip(stream, rows, strict=True)]


@torch.no_grad()
def _stream(model: Any, hook: ModelHook, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the activations at all tokens of the rows and of their padding."""
    device = next(model.parameters()).device
    # Padding follows the text, and attention is causal.
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=hook.autocast):
        _, cache = model.run_with_cache(
            tokens.to(device),
            names_filter=[hook.name],
            stop_at_layer=extract_stop_at_layer_from_tlens_hook_name(hook.name),
            prepend_bos=False,
            **hook.model_kwargs,
        )
    stream: Tensor = cache[hook.name]
    return (stream if hook.head_index is None else stream[:, :, hook.head_index]).flatten(2)
