import math
from bisect import bisect
from itertools import accumulate, product

import pytest
import torch
from scipy.stats import binom

from sae_lens_atm.metrics.probes import f1_scores
from sae_lens_atm.metrics.word_figures import (
    FoundOnWords,
    intervals_of,
    resampled,
    splits_of,
    word_figures,
)


def found_on(letter, fraction, letters=3, **given):
    """What was found on words: nothing but the absorbed fraction, and what is given."""
    words = len(letter)
    nothing = torch.zeros(words, letters, 1, dtype=torch.bool)
    every = torch.ones(letters, dtype=torch.bool)
    fields = {
        "letter": torch.as_tensor(letter),
        "fraction": torch.as_tensor(fraction, dtype=torch.float64),
        "full": torch.as_tensor(fraction, dtype=torch.float64).round(),
        "active": torch.zeros(words),
        "by_probe": nothing[..., 0],
        "by_best": nothing,
        "by_sparse": nothing.repeat(1, 1, 3),
        "counts": every,
        "learned": every,
    }
    return FoundOnWords(**(fields | given))


def random_words(words=60, letters=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    letter = torch.randint(letters, (words,), generator=generator)
    fraction = torch.rand(words, generator=generator, dtype=torch.float64)
    fraction[torch.rand(words, generator=generator) < 0.3] = math.nan

    def coins(*more):
        return torch.rand(words, letters, *more, generator=generator) < 0.4

    return found_on(
        letter,
        fraction,
        letters,
        active=torch.randint(5, (words,), generator=generator),
        by_probe=coins(),
        by_best=coins(4),
        by_sparse=coins(3),
        counts=torch.tensor([True, True, False, True]),
        learned=torch.tensor([True, False, False, True]),
    )


def by_the_book(found, taken):
    """The figures of a list of words, word by word. Words may occur more than once."""
    letters = [int(found.letter[i]) for i in taken]

    def mean(values):
        known = [v for v in values if not math.isnan(v)]
        return sum(known) / len(known) if known else math.nan

    def over(chosen, of_letter):
        return mean([of_letter(c) for c in chosen.nonzero().squeeze(1).tolist()])

    def absorbed(values):
        return lambda c: mean(
            [float(values[i]) for i, letter in zip(taken, letters, strict=True) if letter == c]
        )

    def f1(predicted):
        def of(c):
            pairs = [(bool(predicted[i, c]), x == c) for i, x in zip(taken, letters, strict=True)]
            hits = sum(yes and true for yes, true in pairs)
            return 2 * hits / max(sum(yes + true for yes, true in pairs), 1)

        return of

    def accuracy(predicted):
        def of(c):
            recalls = [
                mean(
                    [
                        float(bool(predicted[i, c]) == now)
                        for i, x in zip(taken, letters, strict=True)
                        if (x == c) == now
                    ]
                )
                for now in (True, False)
            ]
            return sum(recalls) / 2

        return of

    def splits(c):
        values = [f1(found.by_best[..., k])(c) for k in range(found.by_best.shape[-1])]
        return float(splits_of(torch.tensor([values]))[0])

    best = f1(found.by_best[..., 0])
    return {
        "absorption_full": over(found.counts, absorbed(found.full)),
        "absorption_fraction": over(found.counts, absorbed(found.fraction)),
        "l0_words": mean([float(found.active[i]) for i in taken]),
        "absorption_full_learned": over(found.learned, absorbed(found.full)),
        "absorption_fraction_learned": over(found.learned, absorbed(found.fraction)),
        "parents_learned": over(found.counts, lambda c: float(best(c) >= 0.5)),
        "probe_f1": over(found.counts, f1(found.by_probe)),
        "k1_f1": over(found.counts, best),
        "feature_splits": over(found.counts, splits),
        "sparse_probing_1": over(found.counts, accuracy(found.by_sparse[..., 0])),
        "sparse_probing_2": over(found.counts, accuracy(found.by_sparse[..., 1])),
        "sparse_probing_5": over(found.counts, accuracy(found.by_sparse[..., 2])),
    }


def test_figures_of_all_words_are_those_word_by_word():
    found = random_words()
    figures = word_figures(found, torch.ones(1, 60))
    expected = by_the_book(found, range(60))
    assert {name: value.item() for name, value in figures.items()} == pytest.approx(expected)


def test_figures_of_resamples_are_those_of_lists_with_repeated_words():
    found = random_words(seed=1)
    (weights,) = resampled(found.letter, 5, torch.Generator().manual_seed(2))
    figures = word_figures(found, weights)
    for sample, row in enumerate(weights.long().tolist()):
        taken = [i for i, times in enumerate(row) for _ in range(times)]
        got = {name: values[sample].item() for name, values in figures.items()}
        assert got == pytest.approx(by_the_book(found, taken))


def test_weighted_f1_of_ones_is_plain_f1():
    found = random_words(seed=3)
    is_letter = torch.nn.functional.one_hot(found.letter, 4).bool()
    expected = f1_scores(found.by_probe, is_letter)[found.counts].mean()
    assert word_figures(found, torch.ones(1, 60))["probe_f1"].item() == pytest.approx(expected)


def test_a_resample_keeps_the_number_of_words_of_each_letter():
    letter = torch.tensor([2, 0, 1, 0, 2, 2, 0, 5])
    parts = list(resampled(letter, 250, torch.Generator().manual_seed(0)))
    assert [len(part) for part in parts] == [100, 100, 50]
    weights = torch.cat(parts)
    for c in (0, 1, 2, 5):
        assert (weights[:, letter == c].sum(1) == (letter == c).sum()).all()
    # Each word is taken once on average, with the variance 1 - 1/n of a multinomial.
    assert weights.mean(0).tolist() == pytest.approx([1] * 8, abs=0.2)
    assert weights[:, letter == 0].var(0).mean().item() == pytest.approx(2 / 3, abs=0.1)


@pytest.mark.parametrize(("words", "absorbed"), [(400, 40), (60, 30), (1000, 5)])
def test_the_interval_of_a_share_is_that_of_the_binomial_distribution(words, absorbed):
    fraction = (torch.arange(words) < absorbed).double()
    found = found_on(torch.zeros(words, dtype=torch.long), fraction, letters=1)
    low, high = intervals_of(found, torch.Generator().manual_seed(0), 20_000)["absorption_full"]
    expected = binom.ppf([0.025, 0.975], words, absorbed / words) / words
    assert (low, high) == pytest.approx(tuple(expected), abs=1.01 / words)


def test_the_interval_of_a_mean_over_letters_is_that_of_all_outcomes():
    # Shares of .5, .1 and .2 among 20, 10 and 5 words, averaged.
    sizes, shares = (20, 10, 5), (0.5, 0.1, 0.2)
    letter = torch.cat([torch.full((n,), i) for i, n in enumerate(sizes)])
    parts = [torch.arange(n) < round(p * n) for n, p in zip(sizes, shares, strict=True)]
    found = found_on(letter, torch.cat(parts).double())
    low, high = intervals_of(found, torch.Generator().manual_seed(0), 20_000)["absorption_fraction"]
    outcomes = sorted(
        (
            sum(a / n for a, n in zip(absorbed, sizes, strict=True)) / 3,
            math.prod(binom.pmf(a, n, p) for a, n, p in zip(absorbed, sizes, shares, strict=True)),
        )
        for absorbed in product(*(range(n + 1) for n in sizes))
    )
    values = [value for value, _ in outcomes]
    below = list(accumulate(probability for _, probability in outcomes))
    expected = tuple(values[bisect(below, share)] for share in (0.025, 0.975))
    assert (low, high) == pytest.approx(expected, abs=0.018)  # outcomes are 1/60 apart


def test_intervals_depend_on_the_generator_alone_and_hold_the_figure():
    found = random_words(words=300, seed=4)
    intervals = intervals_of(found, torch.Generator().manual_seed(7))
    assert intervals == intervals_of(found, torch.Generator().manual_seed(7))
    for name, value in word_figures(found, torch.ones(1, 300)).items():
        low, high = intervals[name]
        assert low <= value.item() <= high
        assert low < high or name == "parents_learned"


def test_a_letter_without_any_word_in_a_resample_is_left_out():
    # Absorption is read on one of two words of letter 0: a quarter of the resamples have none.
    found = found_on([0, 0, 1], [1.0, math.nan, 0.0], letters=2)
    weights = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    assert word_figures(found, weights)["absorption_fraction"].tolist() == [0.0, 0.5]


def test_splits_stop_at_the_first_latent_that_does_not_raise_f1():
    f1 = torch.tensor([[0.5, 0.52, 0.9], [0.5, 0.6, 0.7], [0.5, 0.54, 0.55], [0.9, 0.1, 0.99]])
    assert splits_of(f1).tolist() == [1, 3, 2, 1]
