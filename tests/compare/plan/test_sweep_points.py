import math
from itertools import product
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sae_lens_atm.compare.plan.sweep_points import Range, sweep_points


def test_a_grid_has_every_combination_once():
    axes = {"a": [1, 2, 2], "b": ["x", "y"], "c": [None]}
    points = [tuple(point.values()) for point in sweep_points(axes, None, 0)]
    assert points == list(product([1, 2], ["x", "y"], [None]))


def test_more_points_or_fields_leave_the_others_unchanged():
    axes = {"a": Range(low=0.0, high=1.0), "b": ["x", "y"], "c": Range(low=1, high=10**6)}
    few, many = sweep_points(axes, 5, 3), sweep_points(axes, 9, 3)
    assert many[:5] == few
    assert len(many) == 9
    assert sweep_points(axes, 5, 4) != few
    alone = sweep_points({"c": axes["c"]}, 5, 3)
    assert [point["c"] for point in alone] == [point["c"] for point in few]


@given(st.integers(1, 1000), st.integers(1, 1000), st.booleans(), st.booleans())
def test_draws_are_in_their_range(low, width, log, whole):
    ends = (low, low + width) if whole else (low / 7, (low + width) / 7)
    axis = Range(low=ends[0], high=ends[1], log=log)
    for point in sweep_points({"x": axis}, 20, 0):
        assert ends[0] <= point["x"] <= ends[1]
        assert isinstance(point["x"], int) == whole


def test_draws_are_uniform_or_uniform_in_the_logarithm():
    def drawn(**kwargs):
        return [point["x"] for point in sweep_points({"x": Range(**kwargs)}, 4000, 0)]

    # standard errors: 0.5 and 0.01
    assert fmean(drawn(low=0.0, high=100.0)) == pytest.approx(50, abs=2)
    assert fmean(map(math.log10, drawn(low=1e-2, high=1.0, log=True))) == pytest.approx(
        -1, abs=0.05
    )
    for log in (False, True):
        axis = {"x": Range(low=2, high=5, log=log)}
        assert {point["x"] for point in sweep_points(axis, 200, 0)} == {2, 3, 4, 5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"low": 2, "high": 1}, "low must be less than high, 1, got 2"),
        ({"low": 0, "high": 1, "log": True}, "low must be more than 0 with log, got 0"),
        ({"low": math.nan, "high": 1}, "finite"),
        ({"low": 1}, "high"),
    ],
)
def test_a_wrong_range_is_an_error(values, message):
    with pytest.raises(ValidationError, match=message):
        Range(**values)
