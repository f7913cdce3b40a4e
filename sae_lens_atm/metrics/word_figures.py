"""The figures of first letters, from what was found on each test word, and their sampling errors.

The sampling error comes from a bootstrap over the test words. Words are drawn with replacement
within each letter, so every letter keeps its number of words. The probes, the main latents and the
letters that count stay as they are. An interval holds the middle 95% of the resampled figures.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sae_lens_atm.metrics.detectors import SPLIT_GAIN

RESAMPLES = 1000
LEARNED_F1 = 0.5
PROBED_WITH = (1, 2, 5)
"""Numbers of latents that sparse probing uses."""
_OUTSIDE = 0.025  # share of the resampled figures on each side of an interval
_AT_ONCE = 100  # resamples

Interval = tuple[float, float]


class FoundOnWords(NamedTuple):
    """What was found on each test word. Predictions have a column for each letter."""

    letter: Tensor
    """First letters, 0 to 25, shape ``(words,)``."""
    fraction: Tensor
    """Absorbed fraction, shape ``(words,)``; NaN for words on which absorption is not read."""
    full: Tensor
    """1 for a fully absorbed word, else 0; NaN as in `fraction`."""
    active: Tensor
    """Number of latents that fire on the word in the prompt that measures absorption."""
    by_probe: Tensor
    """What the letters' probes predict, bool, shape ``(words, letters)``."""
    by_best: Tensor
    """What regressions on the best 1, 2, ... latents predict, bool, ``(words, letters, k)``."""
    by_sparse: Tensor
    """What the classifiers of sparse probing predict, bool, one for each of `PROBED_WITH`."""
    counts: Tensor
    """The letters that count, bool, shape ``(letters,)``."""
    learned: Tensor
    """Those of them with a latent of their own."""


def splits_of(f1: Tensor) -> Tensor:
    """Return the number of main latents, from the F1 of the best 1, 2, ... ``(letters, k)``."""
    best, count = f1[:, 0].clone(), torch.ones_like(f1[:, 0], dtype=torch.long)
    going = torch.ones_like(best, dtype=torch.bool)
    for column in f1.T[1:]:
        going &= column > best + SPLIT_GAIN
        best = torch.where(going, column, best)
        count += going
    return count


def word_figures(found: FoundOnWords, weights: Tensor) -> dict[str, Tensor]:
    """Return the figures of weighted words. A mean over no values is NaN.

    Args:
        found: what was found on each word.
        weights: how often each word is taken, shape ``(samples, words)``.

    Returns:
        The figures by name, each of shape ``(samples,)``.
    """
    weights = weights.double()
    is_letter = functional.one_hot(found.letter, len(found.counts)).bool()
    read = found.fraction.isfinite()
    words_read = weights @ (is_letter & read[:, None]).double()
    of_letter = weights @ is_letter.double()

    def absorbed(values: Tensor) -> Tensor:
        return (weights * values.nan_to_num().double()) @ is_letter.double() / words_read

    fraction, full = absorbed(found.fraction), absorbed(found.full)
    best = _weighted_f1(found.by_best, is_letter, weights)
    splits = splits_of(best.flatten(0, 1)).view(best.shape[:2])
    accuracy = _balanced_accuracy(found.by_sparse, is_letter, weights, of_letter)
    counts, learned = found.counts, found.learned
    figures = {
        "absorption_full": full[:, counts],
        "absorption_fraction": fraction[:, counts],
        "l0_words": weights @ found.active.double()[:, None] / weights.sum(1, keepdim=True),
        "absorption_full_learned": full[:, learned],
        "absorption_fraction_learned": fraction[:, learned],
        "parents_learned": (best[:, counts, 0] >= LEARNED_F1).double(),
        "probe_f1": _weighted_f1(found.by_probe[..., None], is_letter, weights)[:, counts, 0],
        "k1_f1": best[:, counts, 0],
        "feature_splits": splits[:, counts].double(),
    }
    for i, k in enumerate(PROBED_WITH[: accuracy.shape[-1]]):
        figures[f"sparse_probing_{k}"] = accuracy[:, counts, i]
    return {name: values.nanmean(1) for name, values in figures.items()}


def intervals_of(
    found: FoundOnWords, generator: torch.Generator, resamples: int = RESAMPLES
) -> dict[str, Interval]:
    """Return the 95% interval of each figure over resampled test words.

    With the same generator and the same words, all SAEs are measured on the same resamples.
    """
    parts = [word_figures(found, w) for w in resampled(found.letter, resamples, generator)]
    edges = torch.tensor([_OUTSIDE, 1 - _OUTSIDE], dtype=torch.float64, device=found.letter.device)
    intervals: dict[str, Interval] = {}
    for name in parts[0]:
        low, high = torch.cat([part[name] for part in parts]).nanquantile(edges).tolist()
        intervals[name] = (low, high)
    return intervals


def resampled(letter: Tensor, number: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield how often resamples take each word, in parts of shape ``(samples, words)``.

    Args:
        letter: first letters, shape ``(words,)``. Each letter keeps its number of words.
        number: number of resamples.
        generator: random numbers.
    """
    place = letter.argsort(stable=True)
    sizes = letter.bincount()
    first, size = (sizes.cumsum(0) - sizes)[letter], sizes[letter]
    for start in range(0, number, _AT_ONCE):
        shape = (min(_AT_ONCE, number - start), len(letter))
        # In double precision the product cannot be rounded up to the size.
        share = torch.rand(shape, generator=generator, dtype=torch.float64).to(letter.device)
        taken = place[first + (share * size).long()]
        yield torch.zeros_like(share).scatter_add_(1, taken, torch.ones_like(share))


def _weighted_f1(predicted: Tensor, is_letter: Tensor, weights: Tensor) -> Tensor:
    """Return F1, shape ``(samples, letters, k)``; 0 without any positive."""
    true = is_letter[..., None]
    hits = _sums(weights, predicted & true)
    positives = _sums(weights, predicted) + _sums(weights, true)
    return 2 * hits / positives.clamp(min=1)


def _balanced_accuracy(
    predicted: Tensor, is_letter: Tensor, weights: Tensor, of_letter: Tensor
) -> Tensor:
    """Return the mean of the recalls of both classes, shape ``(samples, letters, k)``."""
    true = is_letter[..., None]
    others = weights.sum(1, keepdim=True) - of_letter
    recall = _sums(weights, predicted & true) / of_letter[..., None]
    rejected = _sums(weights, ~predicted & ~true) / others[..., None]
    return (recall + rejected) / 2


def _sums(weights: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("rw,wlk->rlk", weights, values.double())
