"""Importance of latents: three signals, their moving averages, one score.

Latent ``i`` has activation ``a_i`` and decoder row ``d_i``; ``e = x - xhat`` is the residual. Pure
functions compute the signals and the score. `ImportanceTracker` stores the moving averages.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_atm.method.buffers import ExactBuffers


class Signals(NamedTuple):
    """The three signals of every latent, each of shape ``(d_sae,)``."""

    magnitude: Tensor
    """``M_i = |d_i| E[a_i]``: mean length of the latent's part of the reconstruction."""
    frequency: Tensor
    """``F_i = P(a_i > 0)``."""
    contribution: Tensor
    """``R_i = E[|e + a_i d_i|^2 - |e|^2]``: increase of the squared error without the latent."""


def batch_signals(acts: Tensor, decoder: Tensor, residual: Tensor) -> Signals:
    """Compute the three signals of one batch.

    With ``xhat = acts @ decoder + bias`` the leave-one-out increase of the squared error is exact::

        R_i = E[|x - (xhat - a_i d_i)|^2 - |x - xhat|^2] = E[2 a_i <d_i, e>] + |d_i|^2 E[a_i^2]

    Args:
        acts: activations ``a``, shape ``(batch, d_sae)``.
        decoder: rows ``d_i`` of any length, shape ``(d_sae, d_in)``.
        residual: ``e = x - xhat``, shape ``(batch, d_in)``.
    """
    wide = torch.promote_types(acts.dtype, torch.float32)
    length = decoder.to(wide).norm(dim=-1)
    # A bfloat16 SAE may be trained on float32 activations. The residual is then float32.
    aligned = residual.to(decoder.dtype) @ decoder.T
    return Signals(
        magnitude=length * acts.mean(0, dtype=wide),
        frequency=(acts > 0).mean(0, dtype=wide),
        contribution=2 * (acts * aligned).mean(0, dtype=wide)
        + length.square() * acts.square().mean(0, dtype=wide),
    )


def moving_average(old: Tensor, new: Tensor, decay: float, where: Tensor) -> Tensor:
    """Return ``decay * old + (1 - decay) * new`` where ``where`` is true, else ``old``."""
    return torch.where(where, decay * old + (1 - decay) * new, old)


def normalize(signal: Tensor) -> Tensor:
    """Return ``max(s_i, 0) / mean_j max(s_j, 0)``, or zeros if the mean is zero.

    A negative contribution means that the reconstruction is better without the latent. It counts
    as zero.
    """
    positive = signal.clamp(min=0)
    mean = positive.mean()
    return torch.where(mean > 0, positive / torch.where(mean > 0, mean, 1.0), 0.0)


def combine_signals(
    signals: Signals, weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
) -> Tensor:
    """Return ``Importance_i = sum_s w_s s_i / sum_s w_s`` over the normalized signals ``s``.

    The result has shape ``(d_sae,)``. It does not change when activations are rescaled.
    """
    total = sum(weights)
    parts = [weight / total * normalize(s) for weight, s in zip(weights, signals, strict=True)]
    return torch.stack(parts).sum(0)


def effective_latents(importance: Tensor) -> Tensor:
    """Return ``(sum_i I_i)^2 / sum_i I_i^2``, the effective number of important latents.

    It is 1 if one latent has all importance, and ``d_sae`` if all latents have the same.
    """
    largest = importance.max()
    share = torch.where(largest > 0, importance / largest, 1.0)
    return share.sum().square() / share.square().sum()


class ImportanceTracker(ExactBuffers):
    """Bias-corrected moving averages of the three signals of each latent, in float32.

    A masked latent keeps its averages. Each latent therefore has its own bias correction: after
    ``n`` updates its ``weight`` is ``1 - decay^n``.
    """

    magnitude: Tensor
    frequency: Tensor
    contribution: Tensor
    weight: Tensor
    """Sum of the weights of all updates of a latent's averages, shape ``(d_sae,)``."""
    steps: Tensor
    """Number of training steps so far. All schedules depend on it."""
    exact_buffers = (*Signals._fields, "weight", "steps")

    def __init__(
        self, d_sae: int, decay: float = 0.99, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.decay = decay
        # The tensor `steps` that `clock` has read, its version, its value.
        self._read: tuple[Tensor | None, int, int] = (None, -1, 0)
        for name in (*Signals._fields, "weight"):
            self.register_buffer(name, torch.zeros(d_sae, dtype=torch.float32, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def update(self, signals: Signals, measured: Tensor) -> None:
        """Update the averages with one batch and increase ``steps`` by one.

        Args:
            signals: means over the batch.
            measured: true for the latents to update, shape ``(d_sae,)``. A latent whose signals
                are not finite is not updated either.
        """
        new = [signal.float() for signal in signals]
        where = measured & torch.stack(new).isfinite().all(0)
        for name, signal in zip(Signals._fields, new, strict=True):
            old = self.get_buffer(name)
            old.copy_(moving_average(old, signal, self.decay, where))
        self.weight.copy_(
            moving_average(self.weight, torch.ones_like(self.weight), self.decay, where)
        )
        now = None if torch.compiler.is_compiling() else self.clock()
        self.steps += 1
        if now is not None:
            self._read = (self.steps, self.steps._version, now + 1)

    def clock(self) -> int:
        """Return ``steps`` as an int.

        The device is read only if something other than `update` has changed ``steps``: each read
        makes the host wait for the device.
        """
        if self._read[0] is not self.steps or self._read[1] != self.steps._version:
            self._read = (self.steps, self.steps._version, int(self.steps))
        return self._read[2]

    def averages(self) -> Signals:
        """Return the bias-corrected averages; zeros for a latent without any update."""
        filled = torch.where(self.weight > 0, self.weight, 1.0)
        return Signals(*(self.get_buffer(name) / filled for name in Signals._fields))
