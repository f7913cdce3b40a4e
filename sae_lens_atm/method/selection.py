"""The largest activations: of a batch, as BatchTopK keeps them, and of each sample."""

from collections.abc import Sequence

from torch import Tensor

_STRIDE = 61  # one of this many values is sampled; a prime, so that all latents are sampled
_MARGIN = 1.2  # number of candidates to find, relative to the number needed


def largest_positive(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest positive values, those that SAELens' BatchTopK keeps.

    The batch is not sorted.

    A sorted sample gives a lower bound of the smallest value to keep, and only the values above the
    bound are sorted. The bound is verified, so that the result is exact. Of equal values at the
    border the first are kept; `torch.topk` leaves this open.

    Returns:
        Indices into ``values.flatten()``, ascending, and the values there.
    """
    flat = values.flatten()
    above = candidates(flat, count)
    found = flat[above]
    if found.numel() <= count:
        return above, found
    if count == 0:
        return above[:0], found[:0]
    border = found.topk(count, sorted=False).values.min()
    kept = found >= border
    surplus = int(kept.sum()) - count
    if surplus > 0:
        kept[(found == border).nonzero().squeeze(1)[-surplus:]] = False
    return above[kept], found[kept]


def largest_of_each(acts: Tensor, numbers: Sequence[int]) -> list[Tensor]:
    """Return, for each number b, the activations with all but the b largest of each sample zero.

    Args:
        acts: shape ``(..., d_sae)``.
        numbers: the numbers b.
    """
    if not numbers:
        return []
    falling = acts.detach().topk(max(numbers), dim=-1).values
    return [acts * (acts.detach() >= falling[..., b - 1 : b]) for b in numbers]


def candidates(flat: Tensor, count: int) -> Tensor:
    """Return ascending indices of positive values that include the `count` largest ones."""
    above = (flat > _lower_bound(flat, count)).nonzero().squeeze(1)
    return above if above.numel() >= count else (flat > 0).nonzero().squeeze(1)


def _lower_bound(flat: Tensor, count: int) -> Tensor:
    """Return a value, at least 0, that probably a few more than `count` values exceed."""
    sample = flat[::_STRIDE]
    expected = count * sample.numel() / max(flat.numel(), 1)
    rank = int(_MARGIN * expected + 4 * expected**0.5) + 1
    if rank >= sample.numel():
        return flat.new_zeros(())
    return sample.topk(rank, sorted=False).values.min().clamp(min=0)
