"""The peak of a curve over L0s: which L0s to try, where the peak is, and its error.

All calculations are in ``u = log(L0)``.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from scipy import stats

FINEST = 1.25
"""Ratio of neighbouring L0s around the peak."""
CONFIDENCE = 0.95
ROUND = 0.25
"""Share of an interval between L0s. A curve is round if the lines through its points cross at least
so far from the highest point on both sides. Those of a parabola cross in the middle."""
RESOLUTION = 0.25
"""Least half-width of an interval, in units of log(FINEST): what the curve can resolve."""
Point = tuple[float, float]
"""``log(L0)`` and the value."""


def grid(low: float, high: float, ratio: float, whole: bool = False) -> list[float]:
    """Return L0s from `low` to `high` at equal ratios.

    Args:
        low: the smallest L0.
        high: the largest L0.
        ratio: the largest ratio of neighbours.
        whole: whether an L0 must be a whole number.
    """
    steps = max(math.ceil(math.log(high / low, ratio) - 1e-9), 1)
    return distinct((low * (high / low) ** (i / steps) for i in range(steps + 1)), whole)


def window(center: float, low: float, high: float, whole: bool = False) -> list[float]:
    """Return five L0s around `center`, at ratios of `FINEST`, between `low` and `high`.

    Args:
        center: the L0 in the middle.
        low: the smallest L0.
        high: the largest L0.
        whole: whether an L0 must be a whole number. Neighbours are then at least 1 apart.
    """
    below, above = _further(center, -1, whole), _further(center, 1, whole)
    around = (_further(below, -1, whole), below, center, above, _further(above, 1, whole))
    return distinct((min(max(l0, low), high) for l0 in around), whole)


def beyond(
    curve: Mapping[float, float], low: float, high: float, whole: bool = False
) -> list[float]:
    """Return the L0s that are missing for the highest value to have two on each side.

    Args:
        curve: the value at each L0 tried.
        low: the smallest L0.
        high: the largest L0.
        whole: whether an L0 must be a whole number.
    """
    l0s = sorted(curve)
    place = l0s.index(highest(curve))
    more: list[float] = []
    for side, end, there in ((-1, l0s[0], place), (1, l0s[-1], len(l0s) - 1 - place)):
        for _ in range(2 - there):
            end = min(max(_further(end, side, whole), low), high)
            more.append(end)
    return [l0 for l0 in distinct(more, whole) if l0 not in curve]


def _further(l0: float, side: int, whole: bool) -> float:
    """Return the next L0 to the side, -1 or 1."""
    ratio = l0 * FINEST**side
    return ratio if not whole else side * max(side * ratio, side * l0 + 1)


def distinct(l0s: Iterable[float], whole: bool) -> list[float]:
    """Return L0s in rising order, each once, rounded to three digits or to whole numbers."""
    rounded = (max(round(l0), 1) if whole else float(f"{l0:.3g}") for l0 in l0s)
    return sorted({float(l0) for l0 in rounded})


def highest(curve: Mapping[float, float]) -> float:
    """Return the L0 with the largest value; of equal values the smallest L0."""
    return max(curve, key=lambda l0: (curve[l0], -l0))


def is_at_edge(curve: Mapping[float, float]) -> bool:
    """Return whether the largest value is that of the smallest or the largest L0."""
    return highest(curve) in (min(curve), max(curve))


def between(curve: Mapping[float, float], whole: bool = False) -> list[float]:
    """Return the L0s halfway from the highest value to the neighbours that are not near it.

    Args:
        curve: the value at each L0 tried.
        whole: whether an L0 must be a whole number.

    Returns:
        Geometric means with neighbours that are further away than `FINEST`.
    """
    l0s = sorted(curve)
    place = l0s.index(highest(curve))
    near = l0s[max(place - 1, 0) : place + 2]
    halfway = (math.sqrt(a * b) for a, b in pairwise(near) if b > FINEST * a)
    return [l0 for l0 in distinct(halfway, whole) if l0 not in curve]


def peak(curve: Mapping[float, float]) -> float:
    """Return the L0 of the peak.

    A curve often has a kink at its peak: it is two lines in ``log(L0)``. The line through the last
    two points before an interval then crosses that through the first two after it. This is tried in
    both intervals beside the highest point. If the curve has a kink, the lines cross in one
    interval, and close to the highest point or outside in the other. If it is round, they cross
    near the middle of both. The peak is then that of the parabola through the highest point and its
    neighbours.

    At the edge of the curve it is the L0 of the highest point.
    """
    best = highest(curve)
    if is_at_edge(curve):
        return best
    l0s = sorted(curve)
    place = l0s.index(best)
    points = [(math.log(l0), curve[l0]) for l0 in l0s]
    if 2 <= place < len(l0s) - 2:
        below = 1 - _crossing(*points[place - 2 : place + 2], outside=1)
        above = _crossing(*points[place - 1 : place + 3], outside=0)
        if min(below, above) < ROUND:
            (u_below, _), (u, _), (u_above, _) = points[place - 1 : place + 2]
            return math.exp(u + above * (u_above - u) - below * (u - u_below))
    return math.exp(_vertex(*points[place - 1 : place + 2]))


def _crossing(a: Point, b: Point, c: Point, d: Point, outside: float) -> float:
    """Return where the line through a and b crosses that through c and d.

    The place is from 0 at b to 1 at c, and `outside` if the lines do not cross there.
    """
    rise, fall = ((right[1] - left[1]) / (right[0] - left[0]) for left, right in ((a, b), (c, d)))
    if rise <= fall:
        return outside
    width = c[0] - b[0]
    place = (c[1] - b[1] - fall * width) / ((rise - fall) * width)
    return place if 0 <= place <= 1 else outside


def _vertex(left: Point, best: Point, right: Point) -> float:
    """Return where the parabola through three points has its peak."""
    a, b = left[0] - best[0], right[0] - best[0]
    below, above = left[1] - best[1], right[1] - best[1]
    # f(u) = p u^2 + q u with f(a) = below and f(b) = above has its peak at -q / (2 p).
    p = (below / a - above / b) / (a - b)
    q = below / a - p * a
    return best[0] - q / (2 * p) if p < 0 else best[0]


def mean_curve(values: Mapping[float, Mapping[int, float]]) -> dict[float, float]:
    """Return the mean over seeds at each L0."""
    return {l0: float(np.mean(list(v.values()))) for l0, v in values.items()}


def interval(values: Mapping[float, Mapping[int, float]]) -> tuple[float, float]:
    """Return the 95% jackknife interval of the peak over seeds.

    It is at least as wide as the curve can resolve. With one seed the error is unknown. The
    interval then reaches to the neighbours of the highest.

    Args:
        values: for each L0 the value of each seed.
    """
    curve = mean_curve(values)
    seeds = sorted(set.intersection(*({*by_seed} for by_seed in values.values())))
    if len(seeds) < 2:
        l0s = sorted(curve)
        place = l0s.index(highest(curve))
        return l0s[max(place - 1, 0)], l0s[min(place + 1, len(l0s) - 1)]
    left_out = [math.log(peak(mean_curve(_without(values, seed)))) for seed in seeds]
    n, middle = len(seeds), math.log(peak(curve))
    error = math.sqrt((n - 1) / n * sum((u - np.mean(left_out)) ** 2 for u in left_out))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    reach = max(reach, RESOLUTION * math.log(FINEST))
    return math.exp(middle - reach), math.exp(middle + reach)


def _without(
    values: Mapping[float, Mapping[int, float]], seed: int
) -> dict[float, dict[int, float]]:
    return {l0: {s: v for s, v in by_seed.items() if s != seed} for l0, by_seed in values.items()}


def flat_sides(values: Mapping[float, Mapping[int, float]]) -> list[str]:
    """Return the sides, "below" and "above", on which the curve does not clearly fall.

    It falls if the value at the peak, less that at the end, is more than two standard errors of
    this difference over seeds. With one seed it falls if the difference is positive. A side on
    which nothing was tried is left out.

    Args:
        values: for each L0 the value of each seed.
    """
    best, ends = highest(mean_curve(values)), {"below": min(values), "above": max(values)}
    return [
        side for side, l0 in ends.items() if l0 != best and not _is_above(values[best], values[l0])
    ]


def _is_above(high: Mapping[int, float], low: Mapping[int, float]) -> bool:
    falls: Sequence[float] = [high[seed] - low[seed] for seed in high.keys() & low.keys()]
    if not falls:
        return False
    error = float(np.std(falls, ddof=1)) / math.sqrt(len(falls)) if len(falls) > 1 else 0.0
    return float(np.mean(falls)) > 2 * error
