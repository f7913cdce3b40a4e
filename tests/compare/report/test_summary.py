import math
from types import SimpleNamespace

import pytest
from scipy import stats

from sae_lens_atm.compare.report.results import Entry, Run, Spread
from sae_lens_atm.compare.report.summary import best_row, best_rows, make_rows, make_tests, spread
from tests.compare.sample import entries_of, row

ROLES = {"atm": "candidate", "a": "baseline", "b": "baseline", "off": "control"}
ENTRIES = {
    name: Entry(architecture="topk", role=role, l0_parameter="k", settings={})
    for name, role in ROLES.items()
}


def run(entry, seed, matched=True, moving=False, l0=4.0, **figures):
    return Run(
        entry=entry, l0_target=l0, seed=seed, figures=figures, matched=matched, moving=moving
    )


def holding(rows, not_ranked=(), entries=ENTRIES):
    return SimpleNamespace(rows=rows, entries=entries, not_ranked=not_ranked)


def test_spread_by_hand():
    assert spread([1.0, 2.0, 3.0]) == Spread(mean=2.0, sd=1.0, n=3)
    assert spread([1.0, None, float("nan")]) == Spread(mean=1.0, sd=None, n=1)
    assert spread([]) == Spread(mean=None, sd=None, n=0)


def test_rows_are_marked_by_their_worst_run():
    runs = [run("a", 0, mcc=0.5), run("a", 1, matched=False, mcc=0.7), run("b", 0, moving=True)]
    rows = make_rows(runs, {})
    assert [(r.entry, r.seeds, r.matched, r.moving) for r in rows] == [
        ("a", [0, 1], False, False),
        ("b", [0], True, True),
    ]
    assert rows[0].figures["mcc"].mean == pytest.approx(0.6)


def test_rows_keep_the_order_of_entries_and_tell_l0s_apart():
    runs = [run("b", 0), run("a", 0), run("b", 0, l0=8.0), run("b", 1), run("a", 1)]
    assert [(r.entry, r.l0_target, r.seeds) for r in make_rows(runs, {})] == [
        ("b", 4.0, [0, 1]),
        ("a", 4.0, [0, 1]),
        ("b", 8.0, [0]),
    ]


def test_stability_joins_its_row():
    stability = {("a", 4.0): Spread(mean=0.9, sd=0.01, n=3)}
    (row,) = make_rows([run("a", 0, mcc=0.5)], stability)
    assert row.figures["stability"].mean == 0.9


def test_best_is_by_the_figures_better_side_and_matched():
    rows = make_rows(
        [
            run("a", 0, mcc=0.5, mse=1.0, l0=4.0),
            run("b", 0, mcc=0.6, mse=2.0, l0=4.0),
            run("off", 0, mcc=0.7, mse=0.5),
            run("atm", 0, mcc=0.9, mse=0.1, matched=False),
        ],
        {},
    )
    assert best_row(rows, "mcc").entry == "off"
    assert best_row(rows, "mse").entry == "off"
    assert best_row(rows, "shrinkage") is None
    assert best_row(rows, "l0") is None
    assert best_rows(holding(rows), "mcc") == {("b", 4.0)}
    assert best_rows(holding(rows), "mse") == {("a", 4.0)}
    assert best_rows(holding(rows), "l0") == set()


def test_what_is_not_ranked_has_no_best_and_no_test():
    runs = [run("a", 0, mcc=0.5, f1=0.5), run("atm", 0, mcc=0.6, f1=0.6)]
    rows = make_rows(runs, {})
    assert best_rows(holding(rows, ["mcc"]), "mcc") == set()
    assert best_rows(holding(rows, ["mcc"]), "f1") == {("atm", 4.0)}
    assert [t.figure for t in make_tests(runs, rows, ENTRIES, ["mcc"])] == ["f1"]


def test_what_is_shown_alike_ties():
    rows = make_rows([run("a", 0, mcc=0.50001), run("b", 0, mcc=0.50002)], {})
    assert best_rows(holding(rows), "mcc") == {("a", 4.0), ("b", 4.0)}


def test_a_candidate_is_tested_against_the_best_baseline_of_each_figure():
    values = {
        "atm": [(0.8, 0.05), (0.9, 0.04), (0.85, 0.06)],
        "a": [(0.7, 0.02), (0.75, 0.01), (0.7, 0.03)],
        "b": [(0.6, 0.2), (0.6, 0.2), (0.6, 0.2)],
        "off": [(0.99, 0.0)] * 3,
    }
    runs = [
        run(name, seed, mcc=mcc, absorption_fraction=fraction)
        for name, figures in values.items()
        for seed, (mcc, fraction) in enumerate(figures)
    ]
    tests = {t.figure: t for t in make_tests(runs, make_rows(runs, {}), ENTRIES)}
    assert {t.baseline for t in tests.values()} == {"a"}  # controls are none
    assert tests["mcc"].difference == pytest.approx((0.1 + 0.15 + 0.15) / 3)
    assert tests["mcc"].better is True
    expected = stats.ttest_rel([0.8, 0.9, 0.85], [0.7, 0.75, 0.7]).pvalue
    assert tests["mcc"].p == pytest.approx(expected)
    assert tests["absorption_fraction"].difference == pytest.approx(0.03)
    assert tests["absorption_fraction"].better is False
    assert tests["absorption_fraction"].p is None  # the same difference each time
    assert {t.n for t in tests.values()} == {3}


def test_only_common_seeds_are_paired():
    runs = [run("atm", 0, mcc=0.8), run("atm", 1, mcc=0.9), run("a", 1, mcc=0.5)]
    (test,) = make_tests(runs, make_rows(runs, {}), ENTRIES)
    assert test.difference == pytest.approx(0.4)
    assert (test.n, test.p) == (1, None)


def test_off_target_rows_are_neither_tested_nor_tested_against():
    off = [run("atm", 0, matched=False, mcc=0.9), run("a", 0, mcc=0.5)]
    assert make_tests(off, make_rows(off, {}), ENTRIES) == []
    rival = [run("atm", 0, mcc=0.9), run("a", 0, matched=False, mcc=0.95), run("b", 0, mcc=0.5)]
    (test,) = make_tests(rival, make_rows(rival, {}), ENTRIES)
    assert (test.baseline, test.off_target) == ("b", ["a"])  # but they are named
    worse = [run("atm", 0, mcc=0.9), run("a", 0, matched=False, mcc=0.4), run("b", 0, mcc=0.5)]
    (test,) = make_tests(worse, make_rows(worse, {}), ENTRIES)
    assert test.off_target == []


def test_stability_is_compared_without_a_p():
    runs = [run("atm", 0), run("a", 0)]
    stability = {
        ("atm", 4.0): Spread(mean=0.9, sd=None, n=1),
        ("a", 4.0): Spread(mean=0.7, sd=None, n=1),
    }
    (test,) = make_tests(runs, make_rows(runs, stability), ENTRIES)
    assert (test.figure, test.difference, test.better, test.p, test.n) == (
        "stability",
        pytest.approx(0.2),
        True,
        None,
        1,
    )


@pytest.mark.parametrize(
    ("figure", "best"),
    [("mcc", {("b", 4.0)}), ("absorption_fraction", {("a", 4.0)}), ("l0", set())],
)
def test_the_best_row_is_no_control_and_met_its_l0(figure, best):
    entries = entries_of(a="candidate", b="baseline", c="baseline", d="control", e="control")
    values = {"a": 0.5, "b": 0.6, "d": 0.9, "e": 0.1}
    rows = [row(name, value, figure=figure) for name, value in values.items()]
    rows += [row("c", extreme, matched=False, figure=figure) for extreme in (0.0, 1.0)]
    assert best_rows(holding(rows, entries=entries), figure) == best


def test_each_l0_has_its_best_and_equal_ones_share_it():
    entries = entries_of(a="candidate", b="baseline", c="baseline")
    rows = [row("a", 0.7001), row("b", 0.7002), row("c", 0.69), row("c", 0.2, l0=8.0)]
    rows += [row("a", None, l0=8.0), row("b", math.nan, l0=8.0)]
    best = {("a", 4.0), ("b", 4.0), ("c", 8.0)}  # 0.700 both, as the table shows them
    assert best_rows(holding(rows, entries=entries), "mcc") == best
