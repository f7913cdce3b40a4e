import math

import pytest

from sae_lens_atm.compare.find_l0.search import FoundL0, Limits, expected_rounds, search

WIDE = Limits(1, 64)


class Bench:
    """Measures a known curve, and notes what was trained."""

    def __init__(self, best, noise=0.0, depth=1.0):
        self.best = best if callable(best) else lambda _length: best
        self.noise, self.depth = noise, depth
        self.calls = []

    def __call__(self, length, l0s, seeds):
        self.calls.append((length, list(l0s), list(seeds)))
        return {(l0, seed): self.value(length, l0, seed) for l0 in l0s for seed in seeds}

    def value(self, length, l0, seed):
        shift = self.noise * (seed - 1)
        return 5 - self.depth * math.log(l0 / self.best(length) * math.exp(shift)) ** 2

    @property
    def lengths(self):
        return [length for length, _, _ in self.calls]


@pytest.mark.parametrize("best", [1.7, 4.2, 11, 30])
def test_a_known_peak_is_found(best):
    bench = Bench(best, noise=0.02)
    found = search(bench, [0, 1, 2], WIDE)
    assert found.l0 == pytest.approx(best, rel=0.01)
    assert found.low < best < found.high < 1.2 * best
    assert found.problems == []
    assert sorted(set(bench.lengths)) == [0.25, 0.5, 1]
    assert [one.length for one in found.rounds] == [0.25, 0.5, 1]


def test_the_first_round_is_a_refined_grid_of_one_seed():
    bench = Bench(4.2)
    search(bench, [5, 6], WIDE)
    assert bench.calls[0] == (0.25, [1, 2, 4, 8, 16, 32, 64], [5])
    assert bench.calls[1] == (0.25, [2.83, 5.66], [5])
    around = pytest.approx([2.69, 3.36, 4.2, 5.25, 6.56], abs=0.01)
    assert bench.calls[-2] == (0.5, around, [5])
    assert bench.calls[-1] == (1, around, [5, 6])


def test_whole_numbers_stay_whole():
    bench = Bench(5.2)
    found = search(bench, [0, 1], Limits(1, 32, whole=True))
    assert all(l0 == round(l0) for _, l0s, _ in bench.calls for l0 in l0s)
    assert found.l0 == pytest.approx(5.2, rel=0.02)


def test_the_window_follows_the_peak():
    bench = Bench({0.25: 4, 0.5: 10, 1: 11}.get)
    found = search(bench, [0, 1], WIDE)
    assert found.l0 == pytest.approx(11, rel=0.02)
    assert bench.lengths.count(0.5) > 1
    assert found.problems == []


def test_an_answer_that_moves_is_searched_for_longer_and_told():
    bench = Bench(lambda length: 4 * 1.5 ** math.log2(length / 0.25))
    found = search(bench, [0, 1], WIDE)
    assert [one.length for one in found.rounds] == [0.25, 0.5, 1, 2]
    (problem,) = found.problems
    assert problem == ("the answer moves with training: 9 at 1 times the training, 13.5 at 2 times")
    assert search(bench, [0, 1], WIDE._replace(longest=1)).rounds[-1].length == 1


def test_it_stops_where_the_answer_stays():
    bench = Bench({0.25: 4, 0.5: 6, 1: 9, 2: 9.2}.get)
    found = search(bench, [0, 1], WIDE._replace(longest=8))
    assert [one.length for one in found.rounds] == [0.25, 0.5, 1, 2]
    assert found.problems == []


@pytest.mark.parametrize(
    ("bench", "seeds", "message"),
    [
        (Bench(0.5), [0, 1], "the peak is at the smallest L0 tried, 1"),
        (Bench(500), [0, 1], "the peak is at the largest L0 tried, 64: allow others with --l0"),
        (Bench(4), [0], "one seed: the error is unknown"),
        (Bench(4, noise=0.3), [0, 1, 2], "the seeds disagree: the interval is"),
        (Bench(4, depth=0.0), [0, 1], "the curve is flat above"),
    ],
)
def test_what_makes_an_answer_unsure_is_told(bench, seeds, message):
    found = search(bench, seeds, WIDE)
    assert any(message in problem for problem in found.problems), found.problems


@pytest.mark.parametrize(("best", "text"), [(0.5, "≤ 1"), (500, "≥ 64")])
def test_at_an_edge_the_answer_is_a_bound(best, text):
    found = search(Bench(best), [0, 1], WIDE)
    assert found.at_edge
    assert found.as_text == (text, "-")


def test_an_answer_as_text():
    found = search(Bench(4.2, noise=0.02), [0, 1, 2], WIDE)
    assert not found.at_edge
    assert found.as_text == ("4.2", f"{found.low:.3g} to {found.high:.3g}")


@pytest.mark.parametrize("whole", [False, True])
def test_the_expected_rounds_are_those_of_a_peak_in_the_middle(whole):
    expected = expected_rounds([0, 1], Limits(1, 16, whole))  # the middle is 4
    first = (
        [[1, 2, 4, 8, 16], [3, 6], [5]] if whole else [[1, 2, 4, 8, 16], [2.83, 5.66], [3.36, 4.76]]
    )
    around = [2, 3, 4, 5, 6] if whole else [2.56, 3.2, 4, 5, 6.25]
    assert expected == [
        *((0.25, l0s, [0]) for l0s in first),
        (0.5, around, [0]),
        (1, around, [0, 1]),
    ]


def test_others_are_only_advised_where_they_are_allowed():
    (low,) = (p for p in search(Bench(0.5), [0, 1], Limits(2, 64)).problems if "smallest" in p)
    assert low == "the peak is at the smallest L0 tried, 2: allow others with --l0 LOW,HIGH"
    (least,) = (p for p in search(Bench(0.5), [0, 1], WIDE).problems if "smallest" in p)
    assert least == "the peak is at the smallest L0 tried, 1"


def test_the_interval_stays_within_the_limits():
    found = search(Bench(4, noise=0.3), [0, 1], Limits(3, 6))
    assert (found.low, found.high) == (3, 6)


def test_an_answer_survives_a_file():
    found = search(Bench(4.2, noise=0.02), [0, 1, 2], WIDE)
    assert FoundL0.model_validate_json(found.model_dump_json()) == found
