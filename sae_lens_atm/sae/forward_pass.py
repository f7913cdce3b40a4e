"""What one pass of a batch through a SAE shows, and the same SAE with fewer latents."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from sae_lens import TrainingSAE
from torch import Tensor

from sae_lens_atm.method.importance import Signals, batch_signals, spread

# What SAELens keeps of each latent, and along which dimension the latents lie.
_PER_LATENT = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0}


class Seen(NamedTuple):
    """One batch as the averages see it: means over it, a masked latent counted as silent."""

    x: Tensor
    signals: Signals
    energy: Tensor
    """``E[(a_i |d_i|)^2]``, shape ``(d_sae,)``."""
    inputs: Callable[[], Tensor]
    """``E[a_i |d_i| x]``, shape ``(d_sae, d_in)``; it costs a product of matrices."""
    exposure: Tensor
    """Share of the batch in which each latent was kept, shape ``(d_sae,)``."""

    def spread(self, kept: Tensor, size: int) -> "Seen":
        """The same of a SAE of ``size`` latents, of which these were looked at and no others."""
        return Seen(
            self.x,
            Signals(*(spread(signal, kept, size) for signal in self.signals)),
            spread(self.energy, kept, size),
            lambda: spread(self.inputs(), kept, size),
            spread(self.exposure, kept, size),
        )


class View(NamedTuple):
    """One pass of a batch: of the full SAE, or of what a mask leaves of it."""

    acts: Tensor
    """Activations as SAELens' trainer is to see them, dense or COO."""
    hidden_pre: Tensor
    sae_out: Tensor
    losses: dict[str, Tensor]
    """Squared error, penalties, auxiliary loss."""
    seen: Callable[[], Seen]
    full_acts: Tensor | None = None
    """Activations of the full SAE, where they were computed."""


@torch.no_grad()
def seen_densely(
    x: Tensor, acts: Tensor, decoder: Tensor, sae_out: Tensor, exposure: Tensor
) -> Seen:
    """`Seen`, of activations in the units of the reconstruction."""
    acts, decoder = acts.detach(), decoder.detach()
    lengths = acts * decoder.norm(dim=-1)

    def inputs() -> Tensor:
        return lengths.T @ x.to(lengths.dtype) / len(x)

    return Seen(
        x,
        batch_signals(acts, decoder, x - sae_out),
        lengths.square().mean(0),
        inputs,
        exposure,
    )


@contextmanager
def narrowed(sae: TrainingSAE[Any], latents: Tensor) -> Generator[None]:
    """The SAE is one of these latents alone: SAELens' own code then computes nothing of others, and
    their gradients come out as 0."""
    narrow = {
        name: getattr(sae, name).index_select(dim, latents)
        for name, dim in _PER_LATENT.items()
        if hasattr(sae, name)
    }
    # An instance's own attributes come before the parameters that torch.nn.Module looks up.
    before = {name: vars(sae)[name] for name in narrow if name in vars(sae)}
    vars(sae).update(narrow)
    try:
        yield
    finally:
        for name in narrow:
            del vars(sae)[name]
        vars(sae).update(before)


def mean_l0(acts: Tensor) -> Tensor:
    """The mean number of active latents."""
    return (acts.values() if acts.is_sparse else acts).count_nonzero() / acts.shape[0]
