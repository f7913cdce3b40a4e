"""The report's parts."""
# ruff: noqa: RUF001  (dashes and minus signs, as the page shows them)

import json
import math
from html.parser import HTMLParser

import pytest
from markupsafe import escape

from sae_lens_atm.compare.report import html as report
from sae_lens_atm.compare.report import results
from sae_lens_atm.metrics.figures import FIGURES
from tests.compare.sample import L0S, ODD, measured_on_words, sample, sample_sweep

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


@pytest.mark.parametrize("missing", [None, math.nan, math.inf])
def test_a_missing_value_sorts_as_an_empty_one(missing):
    assert report.number(missing, "–").value == ""
    assert float(report.number(-1e-7, "0").value) == -1e-7


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


def test_intervals_and_the_definition_of_absorption_are_on_the_page():
    found = measured_on_words()
    page = report.report_html(found)
    assert '0.300<br><small class="soft">[0.280, 0.340]</small>' in page
    assert '<strong>0.150 ± 0.071</strong><br><small class="soft">[0.130, 0.190]</small>' in page
    assert "<li>Absorption is defined as in SAEBench 0.6.0.</li>" in page
    assert "[low, high]: 95% interval" in page


def test_only_rows_have_a_best_cell(comparison):
    rows, runs = (report.table(comparison, h) for h in (comparison.rows, comparison.runs))
    best = [line.entry for line in rows for cell in line.cells if cell.best]
    assert best
    assert not {"masking off", "untrained"} & set(best)
    assert not any(cell.best for line in runs for cell in line.cells)


def test_rows_that_do_not_compare_are_marked(comparison):
    lines = report.table(comparison, comparison.rows)
    marked = {(line.entry, line.cells[0].text): line.marks for line in lines if line.marks}
    assert marked == {("jumprelu", "4"): ["L0 off target"], ("topk", "12"): ["not converged"]}


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
    glances = report.make_glances(comparison)
    assert [(glance.l0, glance.candidate) for glance in glances] == [(l0, "atm") for l0 in L0S]
    figures = ["explained_variance", "mcc", "f1", "absorption_fraction", "stability"]
    assert [test.figure for test in glances[0].tests] == figures
    sure = [t.better for t in glances[0].tests if t.p is not None and t.p < 0.05 and t.difference]
    assert (glances[0].better, glances[0].worse) == (sure.count(True), sure.count(False))
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
            value = attributes.get(name, "#")
            is_link = tag == "a" and value in ("results.json", "results.csv")
            assert is_link or value.startswith(("#", "data:")), (tag, attributes)
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


def test_the_page_reports_quick_runs_and_errors():
    html = report.report_html(sample(quick=True))
    assert 'id="quick"' in html
    assert "the loss is &lt;nan&gt; at step 4100" in html
    fine = sample().model_copy(update={"failed": {}})
    html = report.report_html(fine)
    assert 'id="quick"' not in html
    assert 'id="failed"' not in html


def test_results_without_curves_say_so(comparison):
    empty = {"curve": None, "importance": None, "absorption_by_parent": [], "cosine_map": ""}
    runs = [run.model_copy(update=empty) for run in comparison.runs]
    html = report.report_html(comparison.model_copy(update={"runs": runs}))
    page = Page(html)
    assert page.open == []
    assert "No curves stored" in html
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert "pareto-mcc" in ids
    assert not {"curve-l0", "importance", "parents", "maps"} & ids
    assert "No curves stored" not in report.report_html(comparison)


def test_results_without_runs_are_a_page():
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


def test_every_head_has_its_definition(comparison):
    html = report.report_html(comparison)
    page = Page(html)
    titles = {attributes.get("title") for _, attributes in page.tags}
    shown = [name for name in report.figure_names(comparison.rows) if name in FIGURES]
    assert {FIGURES[name].meaning for name in shown} <= titles
    meanings = html[html.index('id="meanings"') :]
    for name in shown:
        assert meanings.count(f"<dd>{escape(FIGURES[name].meaning)}</dd>") == 1


def test_every_section_is_in_the_navigation(comparison):
    for shown in (comparison, sample_sweep()):
        page = Page(report.report_html(shown))
        sections = [a["aria-labelledby"] for tag, a in page.tags if tag == "section"]
        links = [a["href"] for tag, a in page.tags if a.get("href", "").startswith("#")]
        assert links == [f"#{name}" for name in sections]
        assert ("sweep" in sections) == (shown.sweep is not None)


def test_data_is_beside_the_report(comparison, tmp_path):
    report.write_all(comparison, tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    links = [a["href"] for tag, a in page.tags if tag == "a" and a["href"][0] != "#"]
    assert links == ["results.json", "results.csv"]
    assert all((tmp_path / link).is_file() for link in links)


def test_a_single_latent_is_no_latents():
    results = sample()
    for run in results.runs:
        if run.importance is not None:
            run.importance.latents["roots"] = 1
    html = report.report_html(results)
    assert "(1 latent)" in html
    assert "(1 latents)" not in html
    assert "(24 latents)" in html


def test_a_report_is_below_3_mb(comparison):
    assert len(report.report_html(comparison).encode()) < 3e6
