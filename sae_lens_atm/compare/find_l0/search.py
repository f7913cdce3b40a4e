"""The search for the L0 at which an SAE saves the most bits, at several lengths of training.

1. A grid of L0s, a quarter of the training, one seed. L0s halfway to the neighbours of the highest
   value follow, until these are near.
2. Five L0s around that peak, half of the training, one seed. More follow until there are two on
   each side of the highest value.
3. The same around the new peak, the whole training, all seeds. If the answers of 2 and 3 differ,
   the same at twice the length.

The answer is the peak of the last round. `problems` says what makes it unsure.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

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

GRID_RATIO = 2.0
FIRST, SECOND = 0.25, 0.5
"""Lengths of the first two rounds, in units of the run's training. They have one seed."""
AGREEMENT = 1.15
"""Two answers within this ratio are the same."""


Measure = Callable[[float, Sequence[float], Sequence[int]], Mapping[tuple[float, int], float]]
"""Trains SAEs. Arguments: the length in units of the run's training, the L0s, the seeds. Returns
the bits that each SAE saves, by L0 and seed."""


class Round(BaseModel):
    """What was measured at one length of training."""

    model_config = ConfigDict(extra="forbid")
    length: float
    """In units of the run's training."""
    l0: float
    """Where the mean over seeds is largest."""
    values: dict[float, dict[int, float]]
    """For each L0 the bits saved with each seed."""


class FoundL0(BaseModel):
    """The answer of a search."""

    model_config = ConfigDict(extra="forbid")
    l0: float
    low: float
    high: float
    """A 95% interval, within the L0s that are allowed: the jackknife over seeds."""
    at_edge: bool = False
    """Whether the largest value is at the smallest or the largest L0 tried: there is no peak."""
    problems: list[str]
    """Why the answer is unsure; empty if nothing speaks against it."""
    rounds: list[Round]

    @property
    def as_text(self) -> tuple[str, str]:
        """The L0 and its interval. At an edge, the L0 is a bound, and there is no interval."""
        if not self.at_edge:
            return f"{self.l0:.3g}", f"{self.low:.3g} to {self.high:.3g}"
        sign = "≤" if self.l0 == min(self.rounds[-1].values) else "≥"
        return f"{sign} {self.l0:.3g}", "-"


class Limits(NamedTuple):
    """The L0s that are allowed, and the longest training."""

    low: float
    high: float
    whole: bool = False
    """Whether an L0 must be a whole number."""
    longest: float = 2.0
    """In units of the run's training."""


def search(measure: Measure, seeds: Sequence[int], limits: Limits) -> FoundL0:
    """Find the L0 at which an SAE saves the most bits.

    Args:
        measure: trains SAEs and measures them.
        seeds: the seeds. The first two rounds take the first of them.
        limits: the L0s that are allowed, and the longest training.
    """
    rounds = [_first_round(measure, seeds[:1], limits)]
    length = SECOND
    while True:
        is_long = length >= 1
        used = seeds if is_long else seeds[:1]
        rounds.append(_round_around(rounds[-1].l0, measure, length, used, limits))
        if (is_long and _agree(rounds[-2].l0, rounds[-1].l0)) or 2 * length > limits.longest:
            break
        length *= 2
    last = rounds[-1]
    low, high = (min(max(end, limits.low), limits.high) for end in interval(last.values))
    return FoundL0(
        l0=last.l0,
        low=low,
        high=high,
        at_edge=is_at_edge(mean_curve(last.values)),
        problems=_problems(rounds, low, high),
        rounds=rounds,
    )


def expected_rounds(
    seeds: Sequence[int], limits: Limits
) -> list[tuple[float, list[float], list[int]]]:
    """Return length, L0s and seeds of each call of `Measure`, for a peak in the middle."""
    middle = math.sqrt(limits.low * limits.high)
    calls: list[tuple[float, list[float], list[int]]] = []

    def measure(
        length: float, l0s: Sequence[float], seeds: Sequence[int]
    ) -> dict[tuple[float, int], float]:
        calls.append((length, list(l0s), list(seeds)))
        return {(l0, seed): -abs(math.log(l0 / middle)) for l0 in l0s for seed in seeds}

    search(measure, seeds, limits)
    return calls


def _first_round(measure: Measure, seeds: Sequence[int], limits: Limits) -> Round:
    l0s = grid(limits.low, limits.high, GRID_RATIO, limits.whole)
    return _round(measure, FIRST, seeds, l0s, partial(between, whole=limits.whole))


def _round_around(
    center: float, measure: Measure, length: float, seeds: Sequence[int], limits: Limits
) -> Round:
    low, high, whole, _ = limits
    more = partial(beyond, low=low, high=high, whole=whole)
    return _round(measure, length, seeds, window(center, low, high, whole), more)


def _round(
    measure: Measure,
    length: float,
    seeds: Sequence[int],
    l0s: list[float],
    more: Callable[[dict[float, float]], list[float]],
) -> Round:
    """Measure at `l0s`, and at those that `more` adds to the mean curve until it adds none."""
    found: dict[tuple[float, int], float] = {}
    while l0s:
        found |= measure(length, l0s, seeds)
        l0s = more(mean_curve(_by_l0(found)))
    values = _by_l0(found)
    return Round(length=length, l0=peak(mean_curve(values)), values=values)


def _by_l0(found: Mapping[tuple[float, int], float]) -> dict[float, dict[int, float]]:
    values: dict[float, dict[int, float]] = {}
    for (l0, seed), bits in sorted(found.items()):
        values.setdefault(l0, {})[seed] = bits
    return values


def _agree(a: float, b: float) -> bool:
    return max(a, b) <= AGREEMENT * min(a, b)


def _problems(rounds: Sequence[Round], low: float, high: float) -> list[str]:
    """Return why the answer of the last round is unsure."""
    before, last = rounds[-2:]
    curve = mean_curve(last.values)
    problems: list[str] = []
    if is_at_edge(curve):
        end = "smallest" if highest(curve) == min(curve) else "largest"
        advice = ": allow others with --l0 LOW,HIGH" if last.l0 > 1 else ""
        problems.append(f"the peak is at the {end} L0 tried, {last.l0:g}{advice}")
    problems += [
        f"the curve is flat {side} the peak: its fall is within two standard errors"
        for side in flat_sides(last.values)
    ]
    if not _agree(before.l0, last.l0):
        problems.append(
            f"the answer moves with training: {before.l0:.3g} at {before.length:g} times the "
            f"training, {last.l0:.3g} at {last.length:g} times"
        )
    seeds = max(len(by_seed) for by_seed in last.values.values())
    if seeds < 2:
        problems.append("one seed: the error is unknown")
    elif not _agree(low, last.l0) or not _agree(last.l0, high):
        problems.append(f"the seeds disagree: the interval is {low:.3g} to {high:.3g}")
    return problems
