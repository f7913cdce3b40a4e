"""Description length: the bits that the activations of a sample take.

Ayonrinde, Pearce, Sharkey: *Interpretability as Compression: Reconsidering SAE Explanations of
Neural Activations with MDL-SAEs*, arXiv:2410.11179, as SAEBench 0.6.0 (`evals/mdl`) computes it.
Each latent i fires with probability p_i, and is sent on its own:

    DL = sum_i H(fires_i) + p_i H(level_i | fires_i)    in bits, H the entropy of the samples

The level is one of n equal bins between 0 and the latent's largest activation. n is the smallest of
SAEBench's choices with which the code still reconstructs.

Different from SAEBench: its histogram of levels includes the samples in which the latent does not
fire. And its limit for n has the unit of the data. Here rounding to the middle of the bins may add
1% of the variance of the samples to the squared error.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BINS = (4, 6, 8, 12, 16, 32)
_LIMIT = 0.01


def levels(acts: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Return the level of each activation, and the activation in the middle of its bin.

    Args:
        acts: activations, ``(samples, latents)``; they may be negative.
        bins: number of bins between 0 and the largest activation of a latent.

    Returns:
        Whole numbers from ``-bins`` to ``bins``, 0 where a latent does not fire; and values.
    """
    width = acts.abs().amax(0) / bins
    level = (acts.abs() / width.clamp(min=torch.finfo(acts.dtype).tiny)).ceil().clamp(1, bins)
    level = torch.where(acts == 0, 0, level)
    return (level * acts.sign()).long(), (level - 0.5) * width * acts.sign()


def code_length(level: Tensor, bins: int) -> float:
    """Return the description length of samples with these levels, in bits a sample."""
    samples, latents = level.shape
    sample, latent = level.nonzero(as_tuple=True)
    size = 2 * bins + 1
    cell = latent * size + level[sample, latent] + bins
    counts = torch.bincount(cell, minlength=latents * size).view(latents, size).double()
    fired = counts.sum(1)
    fires = torch.stack([fired, samples - fired], 1)
    return float((entropy(fires) + fired / samples * entropy(counts)).sum())


def description_length(acts: Tensor, x: Tensor, decode: Callable[[Tensor], Tensor]) -> float:
    """Return the description length of an SAE on samples, in bits a sample.

    Args:
        acts: the activations of the samples, ``(samples, latents)``.
        x: the samples, ``(samples, d_in)``.
        decode: reconstructs samples from activations.
    """
    x, acts = x.float(), acts.float()  # squares overflow in float16

    def error(acts: Tensor) -> Tensor:
        return (x - decode(acts).float()).square().sum()

    limit = error(acts) + _LIMIT * (x - x.mean(0)).square().sum()

    def reconstructs(bins: int) -> bool:
        return bool(error(levels(acts, bins)[1]) <= limit)

    bins = next((bins for bins in BINS[:-1] if reconstructs(bins)), BINS[-1])
    return code_length(levels(acts, bins)[0], bins)


def entropy(counts: Tensor) -> Tensor:
    """Return the entropy of counts along the last dimension, in bits."""
    shares = counts.double() / counts.sum(-1, keepdim=True).clamp(min=1)
    return -torch.where(shares > 0, shares * shares.clamp(min=1e-300).log2(), 0.0).sum(-1)
