"""Which next tokens a latent promotes and suppresses, straight through the unembedding."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sae_lens_atm.evaluation.model_from_hook import ModelFromHook
from sae_lens_atm.training.phases import OnPhase, Phase

MOST = 8
_LOGITS = 2**25  # logits in memory at a time
_NORMS = ("ln_final", "norm", "ln_f", "final_layer_norm", "final_layernorm")
"""Names of the last normalisation in TransformerLens and transformers."""
_IN_THE_STREAM = re.compile(
    r"(.*\.)?(hook_resid_(pre|mid|post)|hook_(attn|mlp)_out"  # TransformerLens
    r"|(layers|h|blocks)\.\d+(\.(mlp|attn|self_attn|attention))?)"  # transformers
)
"""Hooks whose activations are the residual stream, or are added to it."""


class Promoted(NamedTuple):
    """Tokens, and the changes of their logits, each of shape ``(d_sae, MOST)``."""

    tokens: NDArray[np.uint32]
    logits: NDArray[np.float32]
    lowest_tokens: NDArray[np.uint32]
    lowest_logits: NDArray[np.float32]


def promoted_tokens(
    model: Any,
    hook_name: str,
    model_kwargs: dict[str, Any],
    decoder: Tensor,
    on_phase: OnPhase,
    on_logits: Callable[[Tensor], None] | None = None,
) -> Promoted | None:
    """Return the tokens whose logits each decoder row raises and lowers most.

    The row, with unit length, goes through the gains of the last normalisation and the unembedding.
    Layers between are left out, and so is the division by the length of the residual stream.

    Args:
        model: the language model.
        hook_name: the hook of the SAE.
        model_kwargs: more arguments of the model's forward pass.
        decoder: the decoder rows, shape ``(d_sae, d_in)``.
        on_phase: is called before each part.
        on_logits: is called with the logits of each part, shape ``(rows, vocabulary)``.

    Returns:
        None if the model is built in an unknown way, or the hook is not in its residual stream.
    """
    if not _IN_THE_STREAM.fullmatch(hook_name):
        return None
    try:
        unembedding = ModelFromHook(model, hook_name, model_kwargs).unembedding
    except (AttributeError, ValueError):
        return None
    weight = unembedding.weight.detach().float().cpu()
    if weight.shape[1] != decoder.shape[1]:
        return None
    rows = torch.nn.functional.normalize(decoder, dim=-1) * _gain(model, weight.shape[1])
    most = min(MOST, len(weight))
    found: list[tuple[Tensor, ...]] = []
    size = max(_LOGITS // len(weight), 1)
    for start in range(0, len(rows), size):
        on_phase(Phase("promoted tokens", start, len(rows), "latents"))
        logits = rows[start : start + size] @ weight.T
        # A number that is added to all logits changes no prediction.
        logits = logits - logits.mean(1, keepdim=True)
        if on_logits is not None:
            on_logits(logits)
        high, low = logits.topk(most, dim=1), logits.topk(most, dim=1, largest=False)
        found.append((high.indices, high.values, low.indices, low.values))
    on_phase(Phase("promoted tokens", len(rows), len(rows), "latents"))
    high, raised, low, lowered = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    return Promoted(high.astype(np.uint32), raised, low.astype(np.uint32), lowered)


@torch.no_grad()
def _gain(model: Any, width: int) -> Tensor:
    """Return the gain of each dimension in the last normalisation; ones if it is not known.

    The input has mean 0 and mean square 1, so that the normalisation does not change its length.
    """
    norm = _last_norm(model)
    ones = torch.ones(width)
    if norm is None or width % 2:
        return ones
    parameter = next(norm.parameters(), None)
    if parameter is None:  # TransformerLens has folded the gain into the unembedding
        return ones
    signs = ones.clone()
    signs[1::2] = -1
    x = signs.to(parameter.device, parameter.dtype)[None, None]
    both = norm(x) - norm(-x)  # without the bias
    return (both.flatten().float().cpu() / 2) * signs


def _last_norm(model: Any) -> nn.Module | None:
    places: list[Any] = [model]
    for name in ("model", "base_model", "decoder", "transformer", "language_model"):
        places += [getattr(place, name) for place in list(places) if hasattr(place, name)]
    for place in reversed(places):
        for name in _NORMS:
            norm = getattr(place, name, None)
            if isinstance(norm, nn.Module):
                return norm
    return None
