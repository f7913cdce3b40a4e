"""Statistics of one batch, from which importance and parents are computed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_atm.method.importance import Signals, batch_signals
from sae_lens_atm.method.sparse import Pattern


class BatchStatistics(NamedTuple):
    """Means over one batch."""

    signals: Signals
    energy: Tensor
    """``E[(a_i |d_i|)^2]``, shape ``(d_sae,)``."""
    mean_input: Tensor
    """``E[x]``, float32, shape ``(d_in,)``."""
    inputs: Callable[[], Tensor]
    """Compute ``E[a_i |d_i| x]``, shape ``(d_sae, d_in)``. It costs one matrix product."""
    measured: Tensor
    """True for the latents whose averages this batch may update, bool, shape ``(d_sae,)``."""


@torch.no_grad()
def dense_statistics(
    x: Tensor, acts: Tensor, decoder: Tensor, sae_out: Tensor, measured: Tensor
) -> BatchStatistics:
    """Return the statistics of a batch with dense activations.

    Args:
        x: inputs, shape ``(batch, d_in)``.
        acts: activations ``a`` in the units of the reconstruction, shape ``(batch, d_sae)``.
        decoder: rows ``d_i`` of any length, shape ``(d_sae, d_in)``.
        sae_out: reconstructions, shape ``(batch, d_in)``.
        measured: as in the result.
    """
    acts, decoder = acts.detach(), decoder.detach()
    lengths = acts * decoder.norm(dim=-1)

    def inputs() -> Tensor:
        return (lengths.T @ x.to(lengths.dtype)).div_(len(x))

    return BatchStatistics(
        signals=batch_signals(acts, decoder, x - sae_out),
        energy=lengths.square().mean(0),
        mean_input=x.mean(0, dtype=torch.float32),
        inputs=inputs,
        measured=measured,
    )


@torch.no_grad()
def sparse_statistics(
    x: Tensor, acts: Tensor, aligned: Tensor, pattern: Pattern, length: Tensor, measured: Tensor
) -> BatchStatistics:
    """Return what `dense_statistics` returns, from the nonzero activations only.

    Args:
        x: inputs, shape ``(batch, d_in)``.
        acts: activations at the entries of the pattern.
        aligned: ``<d_i, e>`` at the entries of the pattern, with ``e`` the residual.
        pattern: the entries of the ``(batch, d_sae)`` matrix of activations.
        length: ``|d_i|``, shape ``(d_sae,)``.
        measured: as in the result.
    """
    lengths = acts * length[pattern.columns]
    squares = lengths.square()

    def mean(values: Tensor) -> Tensor:
        return pattern.sum_of_columns(values) / len(x)

    return BatchStatistics(
        signals=Signals(
            magnitude=mean(lengths),
            frequency=mean(torch.ones_like(acts)),
            contribution=mean(2 * acts * aligned + squares),
        ),
        energy=mean(squares),
        mean_input=x.mean(0, dtype=torch.float32),
        inputs=lambda: (pattern.transposed_matrix(lengths) @ x).div_(len(x)),
        measured=measured,
    )
