"""The largest activations of a batch: what BatchTopK keeps, found without sorting all of it."""

from torch import Tensor

_SAMPLED = 61  # one value in so many is looked at; prime, so that every latent is among them
_MARGIN = 1.2  # how many more than needed the guess should let through


def largest_positive(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which of the values SAELens' BatchTopK keeps: the `count` largest of those above 0.

    A sorted sample bounds from below what the smallest of them can be, and only what lies above the
    bound is sorted. The bound is checked, so the result is exact whatever the sample was. Of equal
    values at the border the first are kept; `torch.topk` leaves open which.

    Returns:
        Their places in ``values.flatten()``, ascending, and their values.
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


def candidates(flat: Tensor, count: int) -> Tensor:
    """Places, ascending, of values above 0 that the `count` largest of them are among."""
    above = (flat > _lower_bound(flat, count)).nonzero().squeeze(1)
    return above if above.numel() >= count else (flat > 0).nonzero().squeeze(1)


def _lower_bound(flat: Tensor, count: int) -> Tensor:
    """A value that rather more than `count` of the values exceed, and at least 0."""
    sample = flat[::_SAMPLED]
    expected = count * sample.numel() / max(flat.numel(), 1)
    rank = int(_MARGIN * expected + 4 * expected**0.5) + 1
    if rank >= sample.numel():
        return flat.new_zeros(())
    return sample.topk(rank, sorted=False).values.min().clamp(min=0)
