"""From runs to rows: means and spreads over seeds, who is best, and how sure that is."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from statistics import fmean, stdev
from typing import Any, TypeGuard

from scipy import stats

from sae_lens_atm.compare.report.results import Entry, PairedTest, Results, Row, Run, Spread
from sae_lens_atm.metrics.figures import FIGURES, figure

_ROUNDING = 1e-12  # a spread below this is none


def is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and not math.isnan(value)


def spread(values: Iterable[float | None]) -> Spread:
    """Mean and standard deviation of the values that there are."""
    found = [v for v in values if is_number(v)]
    return Spread(
        mean=fmean(found) if found else None,
        sd=stdev(found) if len(found) > 1 else None,
        n=len(found),
    )


def make_rows(runs: Sequence[Run], stability: Mapping[tuple[str, float], Spread]) -> list[Row]:
    """One row for each entry and L0, in the order of the runs.

    Args:
        runs: of all seeds.
        stability: of each entry and L0, where there are seeds enough for it.
    """

    def key(run: Run) -> tuple[str, float]:
        return run.entry, run.l0_target

    order = {k: i for i, k in enumerate(dict.fromkeys(key(run) for run in runs))}
    rows: list[Row] = []
    for (entry, l0), group in groupby(sorted(runs, key=lambda run: order[key(run)]), key=key):
        members = list(group)
        names = dict.fromkeys(name for run in members for name in run.figures)
        figures = {name: spread(run.figures.get(name) for run in members) for name in names}
        if (entry, l0) in stability:
            figures["stability"] = stability[entry, l0]
        known = [name for name in FIGURES if name in figures]
        ordered = {name: figures[name] for name in (*known, *figures)}
        rows.append(
            Row(
                entry=entry,
                l0_target=l0,
                seeds=[run.seed for run in members],
                matched=all(run.matched for run in members),
                moving=any(run.moving for run in members),
                figures=ordered,
            )
        )
    return rows


def best_row(rows: Iterable[Row], name: str) -> Row | None:
    """The matched row with the best mean of a figure."""
    better = figure(name).better
    means = [(mean, row) for row in rows if row.matched and (mean := _mean(row, name)) is not None]
    return max(means, key=lambda pair: better * pair[0])[1] if means and better else None


def best_rows(results: Results, name: str) -> set[tuple[str, float]]:
    """(entry, L0) of the best value of a figure at each L0, ties in what is shown included.

    Controls, rows that missed their L0 and figures that are not ranked do not take part.
    """
    rows, entries = results.rows, results.entries
    better, digits = figure(name).better, figure(name).digits
    if name in results.not_ranked:
        return set()
    ranked: dict[float, dict[str, float]] = {}
    for row in rows:
        value = _mean(row, name)
        if better and value is not None and row.matched and entries[row.entry].role != "control":
            ranked.setdefault(row.l0_target, {})[row.entry] = round(better * value, digits)
    return {
        (entry, l0)
        for l0, values in ranked.items()
        for entry, value in values.items()
        if value == max(values.values())
    }


def ranked(results: Results, l0: float) -> list[Row]:
    """The points of a sweep at an L0, best first; those that missed it, or have no value, last."""
    assert results.sweep is not None
    name = results.sweep.objective
    rows = [row for row in results.rows if row.l0_target == l0]

    def place(row: Row) -> tuple[bool, bool, float]:
        value = _mean(row, name)
        return value is None, not row.matched, -figure(name).better * (value or 0.0)

    return sorted(rows, key=place)


def _mean(row: Row, name: str) -> float | None:
    return row.figures[name].mean if name in row.figures else None


def make_tests(
    runs: Sequence[Run],
    rows: Sequence[Row],
    entries: Mapping[str, Entry],
    not_ranked: Collection[str] = (),
) -> list[PairedTest]:
    """Every candidate against the best baseline, figure by figure and L0 by L0.

    Runs of one seed see the same batches, so they are compared seed by seed; where there are
    several language models, model by model, as the seeds of one are no evidence about others. The
    best baseline is another one for each figure, chosen after the fact: that makes it hard for the
    candidate.
    """
    tests: list[PairedTest] = []
    for row in rows:
        if entries[row.entry].role != "candidate" or not row.matched:
            continue
        baselines = [
            other
            for other in rows
            if other.l0_target == row.l0_target and entries[other.entry].role == "baseline"
        ]
        for name in row.figures:
            best = None if name in not_ranked else best_row(baselines, name)
            if best is not None:
                test = _test(runs, row, best, name)
                test.off_target = _better_off_target(baselines, best, name)
                tests.append(test)
    return tests


def _better_off_target(baselines: Iterable[Row], best: Row, name: str) -> list[str]:
    """Baselines with a better mean than the best one, but off the L0 asked for."""
    better, bound = figure(name).better, _mean(best, name) or 0.0
    return [
        row.entry
        for row in baselines
        if not row.matched and (mean := _mean(row, name)) is not None
        if better * (mean - bound) > 0
    ]


def _test(runs: Sequence[Run], row: Row, best: Row, name: str) -> PairedTest:
    def by_seed(entry: str) -> dict[int, float]:
        found: dict[int, list[float]] = {}
        for run in runs:
            value = run.figures.get(name)
            if run.entry == entry and run.l0_target == row.l0_target and is_number(value):
                unit = run.seed if run.model_seed is None else run.model_seed
                found.setdefault(unit, []).append(value)
        return {unit: fmean(values) for unit, values in found.items()}

    ours, theirs = by_seed(row.entry), by_seed(best.entry)
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    difference: float | None = fmean(differences) if differences else None
    pairs = 0
    if name == "stability":  # a figure of all seeds together
        mine, other = _mean(row, name), _mean(best, name)
        difference = mine - other if mine is not None and other is not None else None
        pairs = row.figures[name].n
    p: float | None = None
    if len(differences) > 1 and stdev(differences) > _ROUNDING:
        result: Any = stats.ttest_1samp(differences, 0.0)
        p = float(result.pvalue)
    return PairedTest(
        candidate=row.entry,
        l0_target=row.l0_target,
        figure=name,
        baseline=best.entry,
        difference=difference,
        better=None if not difference else difference * figure(name).better > 0,
        p=p,
        n=len(differences) or pairs,
    )
