"""Summarise runs: means and deviations over seeds, the best rows, and paired tests."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import groupby
from statistics import fmean, stdev
from typing import Any, TypeGuard

from scipy import stats

from sae_lens_atm.compare.report.results import (
    Entry,
    Interval,
    PairedTest,
    Results,
    Row,
    Run,
    Spread,
)
from sae_lens_atm.metrics.figures import FIGURES, figure

_ROUNDING = 1e-12  # a standard deviation below this is a rounding error


def is_number(value: float | None) -> TypeGuard[float]:
    """Return whether a value is neither None nor NaN."""
    return value is not None and not math.isnan(value)


def spread(values: Iterable[float | None]) -> Spread:
    """Return mean and sample standard deviation. None and NaN are left out."""
    numbers = [v for v in values if is_number(v)]
    return Spread(
        mean=fmean(numbers) if numbers else None,
        sd=stdev(numbers) if len(numbers) > 1 else None,
        n=len(numbers),
    )


def make_rows(runs: Sequence[Run], stability: Mapping[tuple[str, float], Spread]) -> list[Row]:
    """Return one row for each entry and L0, in the order of the runs.

    Args:
        runs: the runs of all seeds.
        stability: stability by entry and L0.
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
        in_table_order = [name for name in FIGURES if name in figures]
        ordered = {name: figures[name] for name in (*in_table_order, *figures)}
        rows.append(
            Row(
                entry=entry,
                l0_target=l0,
                seeds=[run.seed for run in members],
                matched=all(run.matched for run in members),
                moving=any(run.moving for run in members),
                figures=ordered,
                intervals=_mean_intervals(members),
            )
        )
    return rows


def _mean_intervals(runs: Sequence[Run]) -> dict[str, Interval]:
    """Return the averaged ends of the runs' intervals."""
    names = dict.fromkeys(name for run in runs for name in run.intervals)
    ends = {name: [run.intervals.get(name, (None, None)) for run in runs] for name in names}
    return {
        name: (spread(low for low, _ in pairs).mean, spread(high for _, high in pairs).mean)
        for name, pairs in ends.items()
    }


def best_row(rows: Iterable[Row], name: str) -> Row | None:
    """Return the matched row with the best mean of a figure, or None."""
    better = figure(name).better
    means = [(mean, row) for row in rows if row.matched and (mean := _mean(row, name)) is not None]
    return max(means, key=lambda pair: better * pair[0])[1] if means and better else None


def best_rows(results: Results, name: str) -> set[tuple[str, float]]:
    """Return (entry, L0) of the best values of a figure at each L0.

    Values that are equal in the shown digits are all best. Controls, rows off their target L0 and
    figures that are not ranked are left out.
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
    """Return the rows of a sweep at an L0, best first. Unmatched and empty rows are last."""
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
    """Test every candidate against the best baseline, for each figure and L0.

    Runs with the same seed are trained on the same batches, so they are paired. With several
    language models, runs are averaged for each model and models are paired: seeds of one model are
    no evidence about other models. The best baseline is chosen for each figure from the same runs,
    which favours the baseline.
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
    """Return the baselines with a better mean than `best` that missed the target L0."""
    better, bound = figure(name).better, _mean(best, name) or 0.0
    return [
        row.entry
        for row in baselines
        if not row.matched and (mean := _mean(row, name)) is not None
        if better * (mean - bound) > 0
    ]


def _test(runs: Sequence[Run], row: Row, best: Row, name: str) -> PairedTest:
    def by_unit(entry: str) -> dict[int, float]:
        values: dict[int, list[float]] = {}
        for run in runs:
            value = run.figures.get(name)
            if run.entry == entry and run.l0_target == row.l0_target and is_number(value):
                unit = run.seed if run.model_seed is None else run.model_seed
                values.setdefault(unit, []).append(value)
        return {unit: fmean(of_unit) for unit, of_unit in values.items()}

    candidate, baseline = by_unit(row.entry), by_unit(best.entry)
    differences = [candidate[unit] - baseline[unit] for unit in candidate if unit in baseline]
    difference: float | None = fmean(differences) if differences else None
    pairs = 0
    if name == "stability":  # a figure of a row, not of its runs
        ours, theirs = _mean(row, name), _mean(best, name)
        difference = ours - theirs if ours is not None and theirs is not None else None
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
