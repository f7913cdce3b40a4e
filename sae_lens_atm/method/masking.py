"""The mask of a training step: threshold, probabilities, random draw. Pure functions.

All random numbers are a function of ``(seed, stream, step, index)``. The same mask can therefore be
drawn after a resume, on another device, on every rank and inside ``torch.compile``. No generator
state is saved, and the global generator is not used.
"""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

_UINT32 = 0xFFFFFFFF
_Word = TypeVar("_Word", int, Tensor)


class Mask(NamedTuple):
    """The mask of one step, and the quantities that it was drawn from."""

    keep: Tensor
    """True for the latents that are kept, shape ``(d_sae,)``."""
    probability: Tensor
    """``p_i``, the probability of masking at this step, shape ``(d_sae,)``."""
    threshold: Tensor
    """``theta_t``."""
    importance: Tensor
    """``Importance_i(t)``, shape ``(d_sae,)``."""
    c: Tensor
    """``c`` at this step."""


def importance_threshold(importance: Tensor, c: float | Tensor) -> Tensor:
    """Return ``theta_t = mu_t + c * sigma_t`` (the paper's), with the population deviation."""
    return importance.mean() + c * importance.std(correction=0)


def mask_probability(importance: Tensor, threshold: Tensor, r: float) -> Tensor:
    """Return ``p_i = 1 - exp(-r (theta - Importance_i) / theta)`` (the paper's), 0 above ``theta``.

    If ``theta <= 0`` all probabilities are 0. The most important latents have probability 0, even
    where a large ``c`` puts ``theta`` above them.
    """
    maskable = (threshold > 0) & (importance < importance.max())
    gap = (threshold - importance).clamp(min=0) / torch.where(threshold > 0, threshold, 1.0)
    return torch.where(maskable, -torch.expm1(-r * gap), 0.0)


def ramp(step: Tensor, length: int) -> Tensor:
    """Return a linear rise from 0 at step 0 to 1 over ``length`` steps. If that is 0, return 1."""
    return (step / length).clamp(max=1) if length else torch.ones_like(step, dtype=torch.float32)


def sample_mask(probability: Tensor, uniform: Tensor) -> Tensor:
    """Keep latent ``i`` with probability ``1 - p_i``. Return a bool tensor, true where kept.

    If no latent would be kept, all are.
    """
    kept = uniform >= probability
    return kept | ~kept.any(-1, keepdim=True)


def uniform_at(step: Tensor, seed: int, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Return uniform float32 numbers in ``[0, 1)`` that depend on the arguments only."""
    key = _hash(_hash(_hash(seed & _UINT32) ^ stream) ^ (step & _UINT32))
    index = torch.arange(torch.Size(shape).numel(), device=step.device).view(shape)
    # The top 24 bits fill a float32 mantissa exactly, so that nothing is rounded up to 1.0.
    return (_hash(_hash(index) ^ key) >> 8).float() * 2.0**-24


def _hash(x: _Word) -> _Word:
    """Return C. Wellons' 32-bit integer hash (``16 21f0aaad 15 735a2d97 15``) of an int or int64.

    Both multipliers are below ``2^31``, so that no product overflows int64.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _UINT32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _UINT32
    return x ^ (x >> 15)
