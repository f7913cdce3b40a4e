"""Cross entropy and KL divergence of a model's predictions, without all logits in memory.

Logits are computed for some positions at a time, from the hidden states before the unembedding.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

TOKENS = 2048
"""Number of tokens in a pass of the model, if a prompt is not longer."""
LOGITS = 2**25
"""Number of logits that are computed at a time: 128 MiB in float32."""
NO_TARGET = -100
"""Marks a position without a next token."""


class Unembedding(NamedTuple):
    """The last layer of a language model, which gives the logits of its vocabulary."""

    weight: Tensor
    """Shape ``(vocabulary, d_model)``."""
    bias: Tensor | None
    softcap: float | None
    """Bound of the logits, as in Gemma 2."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states, in float32 or better."""
        logits = functional.linear(hidden, self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    @property
    def is_linear(self) -> bool:
        """Whether logits are exact linear functions of the hidden state."""
        return self.softcap is None and self.weight.dtype in (torch.float32, torch.float64)

    def parts(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield the tensors in parts of so many positions that their logits fit into memory."""
        size = max(LOGITS // len(self.weight), 1)
        device = self.weight.device
        for part in zip(*(tensor.split(size) for tensor in tensors), strict=True):
            yield tuple(tensor.to(device) for tensor in part)


class Original(NamedTuple):
    """What a KL divergence from the predictions of the original model needs of them.

    The divergence of ``q`` from ``p`` is ``E_p[log p] - E_p[logits of q] + log Z_q``. If logits are
    linear, the second term is ``E_p[weight] @ hidden + E_p[bias]``. ``p`` is then computed once for
    all ``q``.
    """

    constant: Tensor
    """``E_p[log p]``, if logits are linear minus ``E_p[bias]``; shape ``(positions,)``."""
    row: Tensor
    """``E_p[weight]`` if logits are linear, otherwise the hidden states; ``(positions, d)``."""


class Losses(NamedTuple):
    """Sums over positions, in nats."""

    cross_entropy: float
    kl: float


def original_predictions(
    unembedding: Unembedding, hidden: Tensor, targets: Tensor
) -> tuple[Original, float]:
    """Return the predictions of the original model, and the sum of its cross entropies.

    Args:
        unembedding: the last layer of the model.
        hidden: hidden states, shape ``(positions, d_model)``.
        targets: the next tokens, shape ``(positions,)``; `NO_TARGET` where there is none.
    """
    constants: list[Tensor] = []
    rows: list[Tensor] = []
    total = 0.0
    for states, tokens in unembedding.parts(hidden, targets):
        logits = unembedding.logits(states)
        log_p, p = logits.log_softmax(-1), logits.softmax(-1)
        total += _cross_entropy(log_p, tokens)
        constant = torch.linalg.vecdot(p, log_p)
        if unembedding.is_linear:
            states = p @ unembedding.weight
            constant = constant if unembedding.bias is None else constant - p @ unembedding.bias
        constants.append(constant.cpu())
        rows.append(states.cpu())
    return Original(torch.cat(constants), torch.cat(rows)), total


def losses(unembedding: Unembedding, hidden: Tensor, targets: Tensor, original: Original) -> Losses:
    """Return the cross entropy of a changed model, and its KL divergence from the original one.

    Args:
        unembedding: the last layer of both.
        hidden: hidden states of the changed model, shape ``(positions, d_model)``.
        targets: the next tokens, shape ``(positions,)``; `NO_TARGET` where there is none.
        original: the predictions of the original model at these positions.
    """
    cross_entropy = kl = 0.0
    for states, tokens, constant, row in unembedding.parts(hidden, targets, *original):
        logits = unembedding.logits(states)
        log_q = logits.log_softmax(-1)
        cross_entropy += _cross_entropy(log_q, tokens)
        log_z = logits[:, 0] - log_q[:, 0]
        if unembedding.is_linear:
            expected = torch.linalg.vecdot(row, states)
        else:
            expected = torch.linalg.vecdot(unembedding.logits(row).softmax(-1), logits)
        kl += (constant - expected + log_z).sum(dtype=torch.float64).item()
    return Losses(cross_entropy, kl)


def _cross_entropy(log_probabilities: Tensor, targets: Tensor) -> float:
    return functional.nll_loss(
        log_probabilities, targets, ignore_index=NO_TARGET, reduction="sum"
    ).item()
