"""The scale of the activations, estimated before the first step."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

ACCURACY = 1e-3
"""Standard error of the mean norm, relative to it, at which the estimate ends."""
_LEAST = 10  # batches, because the spread of fewer says little


@torch.no_grad()
def mean_norm(batches: Iterator[Tensor], at_most: int) -> float:
    """Return the mean norm of activations, from as many batches as it needs.

    The estimate ends when its standard error, from the spread of the means of the batches, is at
    most `ACCURACY` of it. On the same batches SAELens' estimate is equal.

    Args:
        batches: batches of activations, all of one size.
        at_most: number of batches at which the estimate ends in any case.
    """
    total, count = 0.0, 0
    mean, squares, taken = 0.0, 0.0, 0  # Welford's sums over the means of the batches
    while taken < at_most and not _is_accurate(mean, squares, taken):
        norms = next(batches).norm(dim=-1)
        of_batch = norms.float().sum().item()  # in float32, which float16 would overflow
        total, count, taken = total + of_batch, count + norms.numel(), taken + 1
        difference = of_batch / norms.numel() - mean
        mean += difference / taken
        squares += difference * (of_batch / norms.numel() - mean)
    return total / count


def _is_accurate(mean: float, squares: float, taken: int) -> bool:
    if taken < _LEAST:
        return False
    return math.sqrt(squares / (taken - 1) / taken) <= ACCURACY * mean
