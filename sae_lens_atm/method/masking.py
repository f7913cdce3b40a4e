"""Which latents a step goes without: threshold, probability, draw, schedule. Pure functions.

Everything random here is a function of ``(seed, stream, step, index)`` and nothing else. A step's
mask can thus be drawn again anywhere: after a resume, on another device, on every rank, inside
``torch.compile``. There is no generator state to save, and no global one is touched.
"""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

_UINT32 = 0xFFFFFFFF
_Word = TypeVar("_Word", int, Tensor)


class Mask(NamedTuple):
    """One step's mask, and what it was drawn from."""

    keep: Tensor
    """True where a latent is kept: ``(d_sae,)``, or ``(batch, d_sae)`` with a mask per sample."""
    probability: Tensor
    """``p_i`` in force, schedule included."""
    threshold: Tensor
    """``theta_t``."""
    importance: Tensor
    """``Importance_i(t)``."""
    c: Tensor
    """``c`` in force."""


def importance_threshold(importance: Tensor, c: float | Tensor) -> Tensor:
    """The paper's ``theta_t = mu_t + c * sigma_t`` over the latents (population deviation)."""
    return importance.mean() + c * importance.std(correction=0)


def mask_probability(importance: Tensor, threshold: Tensor, r: float) -> Tensor:
    """The paper's ``p_i = 1 - exp(-r (theta - Importance_i) / theta)`` below ``theta``, else 0.

    Importances are not negative, so nothing lies below a ``theta <= 0`` and nothing is masked. With
    a large ``c`` every latent lies below; the most important (all that are equal to it) is never
    masked.
    """
    maskable = (threshold > 0) & (importance < importance.max())
    gap = (threshold - importance).clamp(min=0) / torch.where(threshold > 0, threshold, 1.0)
    return torch.where(maskable, -torch.expm1(-r * gap), 0.0)


def ramp(step: Tensor, start: int, length: int) -> Tensor:
    """0 up to step ``start``, then linearly to 1 within ``length`` steps; a jump if that is 0."""
    return ((step - start) / max(length, 1)).clamp(0, 1) if length else (step >= start).float()


def sample_mask(probability: Tensor, uniform: Tensor) -> Tensor:
    """Keep latent ``i`` with probability ``1 - p_i``: a boolean, True where kept.

    A draw that would mask every latent masks none.
    """
    kept = uniform >= probability
    return kept | ~kept.any(-1, keepdim=True)


def uniform_at(step: Tensor, seed: int, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform float32 numbers in ``[0, 1)`` that depend on the arguments alone."""
    key = _hash(_hash(_hash(seed & _UINT32) ^ stream) ^ (step & _UINT32))
    index = torch.arange(torch.Size(shape).numel(), device=step.device).view(shape)
    # The top 24 bits fill a float32 mantissa exactly, so that nothing is rounded up to 1.0.
    return (_hash(_hash(index) ^ key) >> 8).float() * 2.0**-24


def _hash(x: _Word) -> _Word:
    """C. Wellons' 32-bit integer hash (``16 21f0aaad 15 735a2d97 15``), of an int or an int64.

    Both multipliers are below ``2^31``, so no product leaves int64.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _UINT32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _UINT32
    return x ^ (x >> 15)
