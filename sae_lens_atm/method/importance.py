"""How much each latent matters: three signals, their moving averages, one score.

Notation follows the paper where it has any: latent ``i`` has activation ``a_i`` and decoder row
``d_i``; ``e = x - xhat`` is the residual. The mathematics is in pure functions; the one module,
`ImportanceTracker`, only remembers the moving averages.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

Combine = Literal["sum", "geometric"]


class Signals(NamedTuple):
    """The three signals of every latent, each of shape ``(d_sae,)``."""

    magnitude: Tensor
    """``M_i = |d_i| E[a_i]``, the mean length that the latent adds to the reconstruction."""
    frequency: Tensor
    """``F_i = P(a_i > 0)``."""
    contribution: Tensor
    """``R_i = E[|e + a_i d_i|^2 - |e|^2]``, the squared error that leaving the latent out adds."""


def batch_signals(acts: Tensor, decoder: Tensor, residual: Tensor) -> Signals:
    """Measure the three signals on one batch.

    With ``xhat = acts @ decoder + bias`` the leave-one-out increase of the squared error is exact:

        R_i = E[|x - (xhat - a_i d_i)|^2 - |x - xhat|^2] = E[2 a_i <d_i, e>] + |d_i|^2 E[a_i^2]

    Args:
        acts: activations ``a``, shape ``(batch, d_sae)``.
        decoder: rows ``d_i`` of any length, shape ``(d_sae, d_in)``.
        residual: ``e = x - xhat``, shape ``(batch, d_in)``.
    """
    wide = torch.promote_types(acts.dtype, torch.float32)
    length = decoder.to(wide).norm(dim=-1)
    # A bfloat16 SAE may be trained on float32 activations, and the residual is float32 then.
    aligned = residual.to(decoder.dtype) @ decoder.T
    return Signals(
        magnitude=length * acts.mean(0, dtype=wide),
        frequency=(acts > 0).mean(0, dtype=wide),
        contribution=2 * (acts * aligned).mean(0, dtype=wide)
        + length.square() * acts.square().mean(0, dtype=wide),
    )


def spread(values: Tensor, places: Tensor, size: int) -> Tensor:
    """Values of some latents among all: rows at these places, 0 elsewhere."""
    return values.new_zeros(size, *values.shape[1:]).index_copy(0, places, values)


def moving_average(old: Tensor, new: Tensor, decay: float, where: Tensor) -> Tensor:
    """``decay * old + (1 - decay) * new`` where asked, ``old`` elsewhere."""
    return torch.where(where, decay * old + (1 - decay) * new, old)


def normalize(signal: Tensor) -> Tensor:
    """``max(s_i, 0) / mean_j max(s_j, 0)``: free of units; all zero where the mean is zero.

    A negative contribution (the reconstruction is better without the latent) counts as none.
    """
    positive = signal.clamp(min=0)
    mean = positive.mean()
    return torch.where(mean > 0, positive / torch.where(mean > 0, mean, 1.0), 0.0)


def combine_signals(
    signals: Signals,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    combine: Combine = "sum",
) -> Tensor:
    """``Importance_i``: the weighted mean of the three normalised signals, shape ``(d_sae,)``.

    ``"sum"`` is the arithmetic mean ``sum_s w_s s_i / sum_s w_s``, ``"geometric"`` the geometric
    one ``prod_s s_i^(w_s / sum_s w_s)``. Both are unchanged when activations are rescaled.
    """
    total = sum(weights)
    parts = [(weight / total, normalize(s)) for weight, s in zip(weights, signals, strict=True)]
    if combine == "geometric":
        return torch.stack([s.pow(w) for w, s in parts]).prod(0)
    return torch.stack([w * s for w, s in parts]).sum(0)


def effective_latents(importance: Tensor) -> Tensor:
    """``(sum_i I_i)^2 / sum_i I_i^2``: how many latents share the importance; 1 where one has it
    all, ``d_sae`` where all have the same or none has any."""
    largest = importance.max()
    share = torch.where(largest > 0, importance / largest, 1.0)
    return share.sum().square() / share.square().sum()


class ExactBuffers(nn.Module):
    """A module whose buffers in ``exact_buffers`` keep their dtype when the module is cast.

    ``sae.to(torch.bfloat16)`` would otherwise round statistics and thresholds for good.
    """

    exact_buffers: ClassVar[tuple[str, ...]] = ()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: self._buffers.get(name) for name in self.exact_buffers}
        result = super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return result


class ImportanceTracker(ExactBuffers):
    """Bias-corrected moving averages of the three signals, per latent, in float32.

    A latent that a step did not see (it was masked) keeps its averages: `weight` is the share of
    the average that has been filled, ``1 - decay^n`` after ``n`` sightings, so each latent is
    corrected by its own history and one without any is never divided by zero.
    """

    magnitude: Tensor
    frequency: Tensor
    contribution: Tensor
    weight: Tensor
    steps: Tensor
    """Training steps so far: the clock of every schedule."""
    exact_buffers = (*Signals._fields, "weight", "steps")

    def __init__(
        self, d_sae: int, decay: float = 0.99, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.decay = decay
        self._read = (-1, -1, 0)  # the tensor that `steps` was read from, its version, its value
        for name in (*Signals._fields, "weight"):
            self.register_buffer(name, torch.zeros(d_sae, dtype=torch.float32, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def update(self, signals: Signals, exposure: Tensor) -> None:
        """Take in one batch.

        Args:
            signals: means over the whole batch, a masked latent counted as silent.
            exposure: share of the batch in which each latent was kept, shape ``(d_sae,)``; the
                means are divided by it, and latents at 0 keep what they had. So do latents whose
                signals are not finite: one bad batch must not poison the averages.
        """
        per_sighting = [s.float() / exposure.clamp(min=1e-12) for s in signals]
        seen = (exposure > 0) & torch.stack(per_sighting).isfinite().all(0)
        for name, new in zip(Signals._fields, per_sighting, strict=True):
            old = self.get_buffer(name)
            old.copy_(moving_average(old, new, self.decay, seen))
        self.weight.copy_(
            moving_average(self.weight, torch.ones_like(self.weight), self.decay, seen)
        )
        now = None if torch.compiler.is_compiling() else self.clock()
        self.steps += 1
        if now is not None:
            self._read = (id(self.steps), self.steps._version, now + 1)

    def clock(self) -> int:
        """`steps`, read from the device only where something else than `update` has set it: a read
        makes the host wait for the device."""
        if self._read[:2] != (id(self.steps), self.steps._version):
            self._read = (id(self.steps), self.steps._version, int(self.steps))
        return self._read[2]

    def averages(self) -> Signals:
        """The bias-corrected averages; zero for a latent that was never seen."""
        filled = torch.where(self.weight > 0, self.weight, 1.0)
        return Signals(*(self.get_buffer(name) / filled for name in Signals._fields))
