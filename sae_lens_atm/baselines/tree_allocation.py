"""Which latent of a Tree SAE is the child of which: algorithms 1 and 2 of arXiv:2605.07922."""

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

_FIRST, _LONGEST, _END = 0.03, 0.1, 0.5  # of the intervals, as shares of the run


def reallocation_end(total: int) -> int:
    """Return the step at which dead children move to the root, of a run of `total` steps."""
    return round(_END * total)


def reallocation_steps(total: int) -> set[int]:
    """Return the steps at which dead children are reallocated, of a run of `total` steps."""
    interval, longest = max(1, round(_FIRST * total)), max(1, round(_LONGEST * total))
    steps: set[int] = set()
    step = interval
    while step < reallocation_end(total):
        steps.add(step)
        interval = min(2 * interval, longest)
        step += interval
    return steps


def reallocated(parents: Tensor, dead: Tensor, capacity: Tensor, living: Tensor) -> Tensor:
    """Return the parents of a layer after its dead children moved (algorithm 2).

    Args:
        parents: the parent of each latent of the layer, an index into `capacity`.
        dead: which latents of the layer are dead.
        capacity: C_p of each possible parent.
        living: which of them may get children.
    """
    present = torch.bincount(parents, minlength=len(capacity)).tolist()
    allowed = living.nonzero().squeeze(1).tolist()
    wanted = [0] * len(capacity)
    for parent, quota in zip(
        allowed, fair_quotas(capacity[living].tolist(), len(parents)), strict=True
    ):
        wanted[parent] = quota
    surplus = [p - w for p, w in zip(present, wanted, strict=True)]
    places = iter([p for p in allowed for _ in range(-surplus[p])])
    result = parents.clone()
    for child in dead.nonzero().squeeze(1).tolist():
        parent = int(parents[child])
        if surplus[parent] <= 0:
            continue
        place = next(places, None)
        if place is None:
            break
        surplus[parent] -= 1
        result[child] = place
    return result


def fair_quotas(capacity: Sequence[float], total: int) -> list[int]:
    """Return how many of `total` children each parent gets (algorithm 1).

    The smallest ``C_p / k_p`` over parents with children is as large as possible: each child goes
    to the parent for which this ratio stays the largest.
    """
    quotas = [0] * len(capacity)
    heap = [(-c, parent) for parent, c in enumerate(capacity)]
    heapq.heapify(heap)
    for _ in range(total):
        _, parent = heap[0]
        quotas[parent] += 1
        heapq.heapreplace(heap, (-capacity[parent] / (quotas[parent] + 1), parent))
    return quotas
