import math

import pytest

from sae_lens_atm.compare.find_l0.peak import (
    between,
    beyond,
    flat_sides,
    grid,
    highest,
    interval,
    is_at_edge,
    mean_curve,
    peak,
    window,
)


def parabola(l0s, best, seed_shift=0.0):
    return {l0: 5 - (math.log(l0 / best) - seed_shift) ** 2 for l0 in l0s}


def test_a_grid_has_equal_ratios():
    assert grid(2, 32, 2) == [2, 4, 8, 16, 32]
    assert grid(1, 10, 2) == pytest.approx([1, 1.78, 3.16, 5.62, 10], abs=0.01)
    assert grid(1, 10, 2, whole=True) == [1, 2, 3, 6, 10]
    assert grid(3, 4, 2) == [3, 4]


def test_a_window_is_around_its_middle():
    assert window(10, 1, 100) == [6.4, 8, 10, 12.5, 15.6]
    assert window(10, 7, 12) == [7, 8, 10, 12]
    assert window(3, 1, 100, whole=True) == [1, 2, 3, 4, 5]
    assert window(20, 1, 100, whole=True) == [13, 16, 20, 25, 31]


def test_two_l0s_on_each_side_of_the_highest():
    assert beyond({4.0: 1, 5.0: 2, 6.0: 3}, 1, 64) == [7.5, 9.38]
    assert beyond({4.0: 1, 5.0: 3, 6.0: 2}, 1, 64) == [3.2, 7.5]
    assert beyond({4.0: 3, 5.0: 2, 6.0: 1}, 3.5, 64) == [3.5]
    assert beyond({4.0: 1, 5.0: 3, 6.0: 2}, 4, 6) == []
    assert beyond({2.0: 1, 3.0: 3, 4.0: 2}, 1, 9, whole=True) == [1, 5]
    assert beyond({1.0: 0, 2.0: 1, 3.0: 3, 4.0: 2, 5.0: 1}, 1, 9) == []


def test_the_highest_and_the_edge():
    assert highest({1.0: 1, 2.0: 3, 4.0: 3}) == 2
    assert not is_at_edge({1.0: 1, 2.0: 3, 4.0: 3})
    assert is_at_edge({1.0: 3, 2.0: 1})
    assert is_at_edge({1.0: 1, 2.0: 3})


def test_halfway_to_the_neighbours():
    assert between({4.0: 2, 8.0: 3, 16.0: 2, 32.0: 1}) == [5.66, 11.3]
    assert between({4.0: 2, 8.0: 1}) == [5.66]
    assert between({7.0: 1, 8.0: 2, 16.0: 1}) == [11.3]  # 7 is near enough
    assert between({4.0: 1, 5.0: 2, 6.0: 1}, whole=True) == []


@pytest.mark.parametrize("best", [3.3, 4.2, 5.9])
def test_the_peak_of_a_parabola_is_exact(best):
    assert peak(parabola([2, 3, 5, 8], best)) == pytest.approx(best)
    assert peak(parabola([1, 2, 3, 5, 8, 12], best)) == pytest.approx(best)


@pytest.mark.parametrize("kink", [3.2, 4.0, 4.5, 6.2])
def test_the_peak_of_two_lines_is_their_crossing(kink):
    l0s = [1.5, 2, 3, 5, 8, 12, 16]
    curve = {l0: min(9 * math.log(l0 / kink), -math.log(l0 / kink)) for l0 in l0s}
    assert peak(curve) == pytest.approx(kink)


def test_the_peak_at_an_edge_or_of_a_plateau():
    assert peak({2.0: 3, 4.0: 2, 8.0: 1}) == 2
    assert peak({2.0: 1, 4.0: 1, 8.0: 1}) == 2
    assert peak({1.0: 0, 2.0: 0, 4.0: 1, 8.0: 1, 16.0: 1, 32.0: 0}) == 4


def test_the_mean_over_seeds():
    assert mean_curve({2.0: {0: 1, 1: 3}, 4.0: {0: 5}}) == {2: 2, 4: 5}


def test_the_interval_is_the_jackknife_by_hand():
    shifts = (-0.1, 0.0, 0.1)  # the peak of each seed, in log(L0), beside that of the mean
    values = {
        l0: {seed: parabola([l0], 4, shift)[l0] for seed, shift in enumerate(shifts)}
        for l0 in (2.0, 3.0, 4.0, 6.0, 9.0)
    }
    # Without a seed the peak is at the mean of the other two: .05, 0 and -.05. Their jackknife
    # error is sqrt(2 / 3 * (.05**2 + .05**2)) = .0577; t of 2 degrees of freedom is 4.303.
    low, high = interval(values)
    assert low == pytest.approx(4 * math.exp(-4.303 * 0.05774), rel=1e-3)
    assert high == pytest.approx(4 * math.exp(4.303 * 0.05774), rel=1e-3)


def test_equal_seeds_have_an_interval_of_the_resolution():
    curve = parabola([2, 3, 4, 6, 9], 4)
    low, high = interval({l0: {0: value, 1: value} for l0, value in curve.items()})
    assert (low, high) == pytest.approx((4 / 1.25**0.25, 4 * 1.25**0.25))


def test_the_interval_of_one_seed_reaches_to_the_neighbours():
    one = {l0: {0: value} for l0, value in parabola([2, 3, 5, 8], 4.2).items()}
    assert interval(one) == (3, 8)


def test_flat_sides():
    steep = {2.0: {0: 1.0, 1: 1.1}, 4.0: {0: 3.0, 1: 3.1}, 8.0: {0: 2.0, 1: 2.1}}
    assert flat_sides(steep) == []
    # The fall above is .1 and .5: mean .3, standard error .2.
    assert flat_sides(steep | {8.0: {0: 2.9, 1: 2.6}}) == ["above"]
    assert flat_sides({2.0: {0: 0.5}, 4.0: {0: 1.0}, 8.0: {0: 1.0}}) == ["above"]
    assert flat_sides({2.0: {0: 1.2}, 4.0: {0: 1.1}, 8.0: {0: 1.0}}) == []
