"""How much of a language model's predictions is left with an SAE's reconstruction in it.

Definitions are SAELens': the cross entropy with the reconstruction, with zeros and without a
change, and the KL divergence of the first two from the original predictions. The passes without an
SAE are made once for all SAEs at a hook.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from torch import Tensor

from sae_lens_atm.evaluation.model_from_hook import FullPass, ModelFromHook
from sae_lens_atm.evaluation.next_token_loss import (
    NO_TARGET,
    Losses,
    Original,
    losses,
    original_predictions,
)

_HEADS = ("hook_q", "hook_k", "hook_v", "hook_z")  # hooks with a dimension of heads
OnBatch = Callable[[int, int], None]
"""Is called before each batch, with the number of finished batches and of all. An exception stops
the evaluation."""


def ignore_batch(_done: int, _every: int) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class HookPoint:
    """Where an SAE reads and replaces activations."""

    name: str
    head_index: int | None = None

    def read(self, activation: Tensor) -> Tensor:
        """Return the input of an SAE, shape ``(prompts, context, d_in)``."""
        if self.head_index is not None:
            return activation[:, :, self.head_index]
        has_heads = any(name in self.name for name in _HEADS)
        return activation.flatten(-2, -1) if has_heads else activation

    def write(self, activation: Tensor, new: Tensor) -> Tensor:
        """Return the activation with the part that `read` returns replaced."""
        if self.head_index is None:
            return new.reshape(activation.shape)
        activation = activation.clone()
        activation[:, :, self.head_index] = new
        return activation


@dataclass(frozen=True)
class Batch:
    """A batch of tokens, and the pass of the original model on it."""

    tokens: Tensor
    counted: Tensor
    """The tokens that are not excluded, bool."""
    targets: Tensor
    """The next token of each counted one; `NO_TARGET` at the end and in padding."""
    full: FullPass
    original: Original
    cross_entropy: float


class SharedPasses:
    """The passes of a language model that all SAEs at a hook share.

    Args:
        model: the model, as it runs from the hook on.
        hook: the hook.
        batches: the tokens.
        excluded: tokens that are not counted. Their activations are not replaced.
    """

    def __init__(
        self,
        model: ModelFromHook,
        hook: HookPoint,
        batches: Sequence[Tensor],
        excluded: Sequence[int],
    ) -> None:
        self._model, self._hook = model, hook
        self._tokens, self._excluded = batches, excluded
        self._passes: list[tuple[Batch, Losses]] = []  # the original pass, and that with zeros
        self._seen = 0

    @torch.no_grad()
    def scores(self, sae: SAE[Any], on_batch: OnBatch) -> dict[str, float]:
        """Return the recovered shares of loss and KL divergence, as SAELens names them.

        Both are left out if zeros at the hook change nothing.
        """
        original = zeros = reconstructed = 0.0
        kl_zeros = kl_reconstructed = 0.0
        total = len(self._tokens)
        for number in range(total):
            on_batch(number, total)
            if number == len(self._passes):
                self._passes.append(self._shared(self._tokens[number]))
            batch, with_zeros = self._passes[number]
            found = self._losses(batch, self._reconstruct(batch, sae))
            original, zeros = original + batch.cross_entropy, zeros + with_zeros.cross_entropy
            reconstructed += found.cross_entropy
            kl_zeros, kl_reconstructed = kl_zeros + with_zeros.kl, kl_reconstructed + found.kl
        if zeros == original or kl_zeros == 0:
            return {}
        return {
            "ce_loss_score": (zeros - reconstructed) / (zeros - original),
            "kl_div_score": (kl_zeros - kl_reconstructed) / kl_zeros,
        }

    def inputs(self) -> Tensor:
        """Return the inputs of an SAE at the counted tokens of the first batch, after `scores`."""
        return next(self.each_inputs())

    def each_inputs(self) -> Iterator[Tensor]:
        """Yield the inputs of an SAE at the counted tokens of each batch, after `scores`."""
        for batch, _ in self._passes:
            inputs = self._hook.read(batch.full.activation)
            yield inputs[batch.counted.to(inputs.device)]

    def run_with_cache(self, *_: Any, **__: Any) -> tuple[None, dict[str, Tensor]]:
        """Return the activations at the hook in the next batch; the first follows the last.

        With this method, SAELens' functions take the stored passes in place of a model.
        """
        batch, _ = self._passes[self._seen % len(self._passes)]
        self._seen += 1
        return None, {self._hook.name: batch.full.activation.to(batch.full.device)}

    def _shared(self, tokens: Tensor) -> tuple[Batch, Losses]:
        full, hidden = self._model.full_pass(tokens)
        excluded = torch.tensor(list(self._excluded), device=tokens.device, dtype=tokens.dtype)
        counted = ~torch.isin(tokens, excluded)
        targets = tokens.roll(-1, 1)
        targets[:, -1] = NO_TARGET
        if full.attended is not None:
            padded = full.attended.to(tokens.device) == 0
            targets[padded | padded.roll(-1, 1)] = NO_TARGET
        targets = targets[counted]
        original, cross_entropy = original_predictions(
            self._model.unembedding, hidden[counted.to(hidden.device)], targets
        )
        batch = Batch(tokens, counted, targets, full, original, cross_entropy)
        part = self._hook.read(full.activation)
        zeros = self._hook.write(full.activation, torch.zeros_like(part))
        return batch, self._losses(batch, zeros)

    def _losses(self, batch: Batch, activation: Tensor) -> Losses:
        hidden = self._model.replaced(batch.tokens, batch.full, activation)
        counted = batch.counted.to(hidden.device)
        return losses(self._model.unembedding, hidden[counted], batch.targets, batch.original)

    def _reconstruct(self, batch: Batch, sae: SAE[Any]) -> Tensor:
        activation = batch.full.activation.to(sae.device)
        x = self._hook.read(activation)
        new = sae.decode(sae.encode(x)).to(x.dtype)
        counted = batch.counted.to(sae.device)[..., None]
        return self._hook.write(activation, new.where(counted, x))
