"""Saved bits: how many bits per sample an SAE saves in a description of the samples.

This part is ours. The idea is that of MDL-SAEs (Ayonrinde et al., arXiv:2410.11179): the best SAE
gives the shortest description. One code describes a sample under a Gaussian with equal variance in
all dimensions. A second code describes the activations, and then the error under such a Gaussian.
Saved bits are the bits per sample that the second code needs less than the first. The precision of
the samples cancels out::

    saved = d/2 log2(V / (E + E L0 / d)) - sum_i H(fires_i) - L0 H(level)

``V`` is the mean squared distance of a sample from the mean, ``E`` the mean squared error of the
reconstruction, ``d`` the dimension, ``H`` the entropy over samples. If ``E`` is larger than ``V``,
it replaces ``V``. An activation is described by its level and its sign. All latents share the step
and the distribution of levels::

    level_i = ceil(|a_i| |d_i| / step),   step = sqrt(12 E / d)

The decoder takes the middle of the level. This adds a squared error of ``step^2 / 12 = E / d`` for
each active latent, on average as much as one dimension of the error has.

Over L0s the figure is largest near the true L0. If the L0 is too low, features are missing, and the
error is large. If it is too high, additional latents cost bits and reduce the error little. With
fewer latents than features it is largest below the number of active features: additional
activations would describe features that have no latent.
"""

import math

import torch
from torch import Tensor

from sae_lens_atm.metrics.description_length import entropy


@torch.no_grad()
def saved_bits(x: Tensor, acts: Tensor, decoder: Tensor, bias: Tensor) -> float:
    """Return the bits per sample that an SAE saves.

    Args:
        x: samples, shape ``(samples, d)``.
        acts: their activations, shape ``(samples, latents)``. They may be negative.
        decoder: the rows that the activations multiply, shape ``(latents, d)``.
        bias: ``b_dec``, shape ``(d,)``.
    """
    samples, d = x.shape
    variance = float((x - x.mean(0)).square().sum()) / samples
    error = float((x - acts @ decoder - bias).square().sum()) / samples
    info = torch.finfo(x.dtype)
    error = max(error, info.eps * variance, info.tiny)
    sample, latent = acts.nonzero(as_tuple=True)
    parts = acts[sample, latent] * decoder.norm(dim=1)[latent]
    l0 = len(parts) / samples
    fired = torch.bincount(latent, minlength=acts.shape[1])
    fires = entropy(torch.stack([fired, samples - fired], 1)).sum()
    level = parts.sign() * (parts.abs() / math.sqrt(12 * error / d)).ceil()
    levels = entropy(level.unique(return_counts=True)[1])
    gained = d / 2 * math.log2(max(variance, error) / (error * (1 + l0 / d)))
    return gained - float(fires + l0 * levels)
