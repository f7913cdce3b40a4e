"""The report's parts."""
# ruff: noqa: RUF001  (dashes and minus signs, as the page shows them)

import json
import math
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from sae_lens_atm.compare.report import html as report
from sae_lens_atm.compare.report import results, summary, wording
from tests.compare.sample import L0S, ODD, entries_of, row, sample

VOID = {"meta", "link", "img", "br", "path", "rect", "input"}


def _test(difference=0.1, better=True, p=0.5):
    return results.PairedTest(
        candidate="atm",
        l0_target=4.0,
        figure="mcc",
        baseline="topk",
        difference=difference,
        better=better,
        p=p,
        n=3,
    )


class Page(HTMLParser):
    """What a page is made of: tags with attributes, and the text of each script."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.scripts, self.open = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.12345, 3, "0.123"),
        (-0.5, 2, "−0.50"),
        (12345.6, 0, "12,346"),
        (0.0, 3, "0.000"),
        (0.00012, 3, "1e−04"),
        (0.0006, 3, "0.001"),
        (None, 3, "–"),
        (math.nan, 3, "–"),
        (math.inf, 3, "–"),
    ],
)
def test_numbers_are_shown_with_the_figures_digits(value, digits, text):
    assert wording.show(value, digits) == text


def test_a_difference_has_its_sign():
    shown = [wording.show(value, 2, "+") for value in (0.25, -0.25, 0.0)]
    assert shown == ["+0.25", "−0.25", "0.00"]


@pytest.mark.parametrize(
    ("mean", "sd", "text"),
    [(0.5, 0.01, "0.50 ± 0.01"), (0.5, None, "0.50"), (None, None, "–"), (math.nan, 0.1, "–")],
)
def test_a_spread_without_a_deviation_is_a_number(mean, sd, text):
    assert wording.show_spread(results.Spread(mean=mean, sd=sd, n=2), 2) == text


@pytest.mark.parametrize(
    ("p", "text"), [(0.0004, "<0.001"), (0.0312, "0.031"), (1.0, "1.000"), (None, "–")]
)
def test_p(p, text):
    assert wording.show_p(p) == text


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_what_is_missing_sorts_by_an_empty_value(missing):
    assert report.number(missing, "–").value == ""
    assert float(report.number(-1e-7, "0").value) == -1e-7


def test_headings_say_which_way_is_better():
    names = ("mcc", "absorption_full", "l0", "odd_extra")
    assert [wording.heading(name) for name in names] == [
        "MCC\N{NO-BREAK SPACE}↑",
        "absorption, full\N{NO-BREAK SPACE}↓",
        "L0",
        "odd extra",
    ]


def _holding(rows, entries, not_ranked=()):
    return SimpleNamespace(rows=rows, entries=entries, not_ranked=not_ranked)


@pytest.mark.parametrize(
    ("figure", "best"),
    [("mcc", {("b", 4.0)}), ("absorption_fraction", {("a", 4.0)}), ("l0", set())],
)
def test_the_best_row_is_no_control_and_met_its_l0(figure, best):
    entries = entries_of(a="candidate", b="baseline", c="baseline", d="control", e="control")
    values = {"a": 0.5, "b": 0.6, "d": 0.9, "e": 0.1}
    rows = [row(name, value, figure=figure) for name, value in values.items()]
    rows += [row("c", extreme, matched=False, figure=figure) for extreme in (0.0, 1.0)]
    assert summary.best_rows(_holding(rows, entries), figure) == best


def test_each_l0_has_its_best_and_equal_ones_share_it():
    entries = entries_of(a="candidate", b="baseline", c="baseline")
    rows = [row("a", 0.7001), row("b", 0.7002), row("c", 0.69), row("c", 0.2, l0=8.0)]
    rows += [row("a", None, l0=8.0), row("b", math.nan, l0=8.0)]
    best = {("a", 4.0), ("b", 4.0), ("c", 8.0)}  # 0.700 both, as the table shows them
    assert summary.best_rows(_holding(rows, entries), "mcc") == best


def test_tables_have_a_cell_for_every_figure(comparison):
    for holders in (comparison.rows, comparison.runs):
        names = report.figure_names(holders)
        assert names[:2] == ["l0", "explained_variance"]
        assert names[-1] == "odd_extra"
        lines = report.table(comparison, holders)
        assert len(lines) == len(holders)
        assert {len(line.cells) for line in lines} == {2 + len(names)}
    first = [line.entry for line in report.table(comparison, comparison.rows)][:7]
    assert first == ["atm", "topk", "batchtopk", "jumprelu", ODD, "masking off", "untrained"]


def test_only_rows_have_a_best_cell(comparison):
    rows, runs = (report.table(comparison, h) for h in (comparison.rows, comparison.runs))
    best = [line.entry for line in rows for cell in line.cells if cell.best]
    assert best
    assert not {"masking off", "untrained"} & set(best)
    assert not any(cell.best for line in runs for cell in line.cells)


def test_rows_that_do_not_compare_are_marked(comparison):
    lines = report.table(comparison, comparison.rows)
    marked = {(line.entry, line.cells[0].text): line.marks for line in lines if line.marks}
    assert marked == {("jumprelu", "4"): ["L0 off"], ("topk", "12"): ["moving"]}


@pytest.mark.parametrize(
    ("test", "symbol", "words"),
    [
        (_test(p=0.01), "▲", "better than"),
        (_test(p=0.05), "△", "better than"),
        (_test(p=None), "△", "better than"),
        (_test(-0.1, False, 0.01), "▼", "worse than"),
        (_test(-0.1, False), "▽", "worse than"),
        (_test(0.0, None, None), "=", "equal to"),
        (_test(0.1, None), "≠", "different from"),
        (_test(None, None, None), "–", "not comparable with"),
    ],
)
def test_a_verdict_is_a_symbol_and_words(test, symbol, words):
    assert report.verdict(test) == (symbol, words)


def test_glances_go_by_l0_and_in_the_tables_order(comparison):
    found = report.glances(comparison)
    assert [(glance.l0, glance.candidate) for glance in found] == [(l0, "atm") for l0 in L0S]
    figures = ["explained_variance", "mcc", "f1", "absorption_fraction", "stability"]
    assert [test.figure for test in found[0].tests] == figures
    sure = [t.better for t in found[0].tests if t.p is not None and t.p < 0.05 and t.difference]
    assert (found[0].better, found[0].worse) == (sure.count(True), sure.count(False))
    assert sure


def test_names_never_become_markup(comparison):
    page = Page(report.report_html(comparison))
    assert page.open == []
    assert {tag for tag, _ in page.tags}.isdisjoint({"b", "nan"})
    data = page.scripts[1]
    assert "<" not in data
    charts = json.loads(data, parse_constant=pytest.fail)
    # Plotly reads a few tags in what it writes: names and hover texts reach it escaped.
    traces = [t for chart in charts.values() for drawn in chart.values() for t in drawn["data"]]
    assert "&lt;b&gt;&amp;x" in {trace.get("name") for trace in traces}
    for trace in traces:
        assert "<b>" not in json.dumps([trace.get(key) for key in ("customdata", "text", "name")])


def test_nothing_is_loaded_from_elsewhere(comparison):
    html = report.report_html(comparison)
    page = Page(html)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_nan_is_no_json_and_is_not_written(comparison):
    changed = comparison.model_copy(deep=True)
    changed.rows[0].figures["mcc"].mean = math.nan
    changed.runs[0].figures["mcc"] = math.nan
    changed.runs[0].curve.explained_variance[3] = math.nan
    changed.runs[0].absorption_by_parent[0] = math.nan
    html = report.report_html(changed)
    json.loads(Page(html).scripts[1], parse_constant=pytest.fail)
    assert ">nan" not in html


def test_the_page_says_what_went_wrong():
    html = report.report_html(sample(quick=True))
    assert "A quick run: nothing was learned" in html
    assert "the loss is &lt;nan&gt; at step 4100" in html
    fine = sample().model_copy(update={"failed": {}})
    html = report.report_html(fine)
    assert 'id="quick"' not in html
    assert 'id="failed"' not in html


def test_a_comparison_without_anything_is_a_page():
    nothing = sample().model_copy(
        update={"runs": [], "rows": [], "tests": [], "parents": [], "entries": {}}
    )
    page = Page(report.report_html(nothing))
    assert page.open == []
    assert not any(attributes.get("class") == "chart" for _, attributes in page.tags)


def test_writing_replaces_what_was_there(comparison, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    assert report.write_report(comparison, path) == path
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [path]
