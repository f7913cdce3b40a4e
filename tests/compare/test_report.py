"""The report's parts, and the page in a real browser."""
# ruff: noqa: RUF001  (dashes and minus signs, as the page shows them)

import json
import math
import os
import shutil
from html.parser import HTMLParser

import pytest

from sae_lens_atm.compare import charts, report, results, summary, wording
from tests.compare.sample import L0S, ODD, sample

VOID = {"meta", "link", "img", "br", "path", "rect", "input"}


@pytest.fixture(scope="module")
def comparison():
    return sample()


def _row(entry, mean, matched=True, l0=4.0, figure="mcc"):
    spread = results.Spread(mean=mean, sd=None, n=1)
    figures = {figure: spread}
    return results.Row(
        entry=entry, l0_target=l0, seeds=[0], matched=matched, moving=False, figures=figures
    )


def _entries(**roles):
    return {
        name: results.Entry(architecture=name, role=role, l0_knob="k", settings={})
        for name, role in roles.items()
    }


def _test(difference=0.1, better=True, p=0.5):
    return results.Test(
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
    assert report.show_p(p) == text


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


@pytest.mark.parametrize(
    ("figure", "best"),
    [("mcc", {("b", 4.0)}), ("absorption_fraction", {("a", 4.0)}), ("l0", set())],
)
def test_the_best_row_is_no_control_and_met_its_l0(figure, best):
    entries = _entries(a="candidate", b="baseline", c="baseline", d="control", e="control")
    values = {"a": 0.5, "b": 0.6, "d": 0.9, "e": 0.1}
    rows = [_row(name, value, figure=figure) for name, value in values.items()]
    rows += [_row("c", extreme, matched=False, figure=figure) for extreme in (0.0, 1.0)]
    assert summary.best_rows(rows, entries, figure) == best


def test_each_l0_has_its_best_and_equal_ones_share_it():
    entries = _entries(a="candidate", b="baseline", c="baseline")
    rows = [_row("a", 0.7001), _row("b", 0.7002), _row("c", 0.69), _row("c", 0.2, l0=8.0)]
    rows += [_row("a", None, l0=8.0), _row("b", math.nan, l0=8.0)]
    best = {("a", 4.0), ("b", 4.0), ("c", 8.0)}  # 0.700 both, as the table shows them
    assert summary.best_rows(rows, entries, "mcc") == best


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
    assert found[0].better + found[0].worse == 4


def test_an_entry_looks_like_no_other():
    entries = _entries(**{f"e{i}": "baseline" for i in range(20)}, a="candidate", c="control")
    styles = charts.entry_styles(entries)
    assert len({(style.colour, style.dash) for style in styles.values()}) == len(styles)
    assert next(iter(styles)) == "a"
    assert styles["a"].width > styles["e0"].width
    assert styles["c"].dash != "solid" == styles["e0"].dash


def test_a_control_that_is_far_off_does_not_squeeze_the_rest():
    low, high = charts.view([1.0, 2.0], [[1.5, 2.4], [1.5, 100.0]])
    assert 0.8 < low < 1
    assert 2.4 < high < 2.6
    low, high = charts.view([0.0])
    assert low < 0 < high


def test_missed_l0s_are_hollow(comparison):
    chart = charts.pareto_panel(comparison, "mcc").charts[""]
    symbols = {trace.meta: trace.marker.symbol for trace in chart.data}
    hollow = {entry: [s.endswith("-open") for s in given] for entry, given in symbols.items()}
    assert hollow.pop("jumprelu") == [True, False, False]
    assert hollow.pop("topk") == [False, False, True]
    assert not any(any(points) for points in hollow.values())


def test_controls_out_of_view_are_named(comparison):
    assert charts.pareto_panel(comparison, "mcc").outside == ["untrained"]


def test_panels_are_of_figures_that_exist(comparison):
    language_model = sample(language_model=True)
    for given, there in ((comparison, "mcc"), (language_model, "ce_loss_score")):
        drawn = [name for name in charts.PARETO if charts.pareto_panel(given, name)]
        assert there in drawn
        assert "explained_variance" in drawn
    assert charts.pareto_panel(language_model, "mcc") is None
    assert charts.curve_panel(language_model, "absorption_fraction") is None
    assert charts.parents_panel(language_model) is None


def test_curves_are_means_of_what_is_known(comparison):
    template = comparison.runs[0]
    runs = [
        template.model_copy(
            update={
                "curve": results.Curve(
                    steps=steps, explained_variance=values, l0=[], dead_latents=[]
                )
            }
        )
        for steps, values in [([0, 10], [None, 0.4]), ([0, 10, 20], [math.nan, 0.6, 0.7])]
    ]
    none = template.model_copy(update={"curve": None})
    curve = charts.mean_curve([*runs, none], "explained_variance")
    assert curve == {0: None, 10: 0.5, 20: 0.7}


def test_there_is_a_curve_for_each_l0(comparison):
    panel = charts.curve_panel(comparison, "explained_variance")
    assert list(panel.charts) == ["4", "8", "12"]
    assert [trace.meta for trace in panel.charts["4"].data][-1] == "masking off"  # none untrained


def test_importance_is_of_the_first_seed_at_the_middle_l0(comparison):
    chosen = [(run.entry, run.l0_target, run.seed) for run, _ in charts.importance_runs(comparison)]
    assert chosen == [("atm", 8.0, 0), ("masking off", 8.0, 0)]


def test_a_log_axis_gets_no_zero():
    importance = results.Importance(
        steps=[0, 1, 2],
        threshold=[None, 1.0, 1.0],
        groups={"g": [[0.0, 0.0, 2.0], [0.0, 1.0, 2.0], [None, None, None]]},
        latents={"g": 3},
    )
    chart = charts.importance_chart(importance, 0.01)
    band, median, threshold = chart.data
    assert list(band.y) == [0.01, 0.01, 2.0, 2.0]
    assert list(median.y) == [None, 1.0]
    assert list(threshold.y) == [None, 1.0, 1.0]


def test_parents_go_by_depth_then_probability(comparison):
    panel = charts.parents_panel(comparison)
    assert list(panel.charts) == ["4", "8", "12"]
    heatmap = panel.charts["8"].data[0]
    by_feature = {parent.feature: parent for parent in comparison.parents}
    shown = [by_feature[int(text.split("feature ")[1].split(",")[0])] for text in heatmap.text[0]]
    keys = [(parent.depth, -(parent.probability or 0)) for parent in shown]
    assert keys == sorted(keys)
    assert heatmap.zmax < 1  # the untrained control reaches 1
    unmeasured = next(i for i, parent in enumerate(shown) if parent is comparison.parents[11])
    assert all(row[unmeasured] is None for row in heatmap.z)
    runs = [run for run in comparison.runs if (run.entry, run.l0_target) == ("atm", 8.0)]
    at = comparison.parents.index(shown[0])
    expected = sum(run.absorption_by_parent[at] for run in runs) / len(runs)
    assert heatmap.z[0][0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("atm", "atm"),
        ("matching_pursuit (fixed steps)", "matching_pursuit<br>(fixed steps)"),
        ("matryoshka_batchtopk", "matryoshka_<br>batchtopk"),
        (ODD, "&lt;b&gt;&amp;x"),
    ],
)
def test_long_names_are_broken_beside_a_heatmap(name, label):
    assert charts.tick_label(name) == label


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


def _missing(what):
    """In CI a browser is there, and a test that is skipped would go unnoticed."""
    (pytest.fail if "CI" in os.environ else pytest.skip)(f"{what} is not installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        _missing("selenium")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver_path = shutil.which("chromedriver")
    if not chromium or not driver_path:
        _missing("Chromium or chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    flags = "headless=new no-sandbox disable-gpu no-first-run disable-background-networking"
    for flag in [*flags.split(), "disable-component-update", "disable-sync"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(driver_path))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory, comparison):
    return report.write_report(comparison, tmp_path_factory.mktemp("r") / "report.html").as_uri()


@pytest.fixture
def page(browser, address):
    """The page, new, at a desk's width and in light colours."""
    _show(browser, address)
    yield browser
    browser.execute_script("localStorage.clear()")


def _show(browser, address, width=1280, scheme="light"):
    scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme_feature]})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(address)


def _click(browser, selector):
    browser.execute_script(f"document.querySelector({json.dumps(selector)}).click()")


def _column(browser, heading):
    """A column of the table of rows: its values as sorted by, its `aria-sort`, its button."""
    return browser.execute_script(
        """
        const table = document.getElementById("rows");
        const heads = [...table.tHead.rows[0].cells];
        const head = heads.find((cell) => cell.innerText.trim() === arguments[0]);
        const rows = [...table.tBodies[0].rows];
        const values = rows.map((row) => row.cells[head.cellIndex].dataset.value);
        return [values, head.getAttribute("aria-sort"), head.querySelector("button")];
        """,
        heading,
    )


def test_every_chart_is_drawn_and_nothing_complains(page):
    ticks = page.execute_script(
        'return [...document.querySelectorAll(".chart")].map('
        '(c) => c.querySelectorAll(".main-svg .xtick, .main-svg .ytick").length)'
    )
    assert len(ticks) == 4 + 4 + 2 + 1
    assert all(ticks)
    assert page.execute_script("return [...document.images].map((i) => i.naturalWidth)") == [96] * 7
    loaded = page.execute_script(
        "return performance.getEntriesByType('resource').map((e) => e.name)"
    )
    assert all(name.startswith(("data:", "blob:")) for name in loaded)
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_an_odd_name_is_shown_as_it_is(page):
    keys = page.execute_script(
        "return [...document.querySelectorAll('.key')].map((k) => k.innerText)"
    )
    assert [key.strip() for key in keys].count(ODD) == 2
    assert ODD in page.execute_script(
        "return [...document.querySelectorAll('#parents .ytick')].map((tick) => tick.textContent)"
    )
    assert not page.execute_script("return document.querySelector('b')")


def test_a_heading_sorts_by_number_and_back(page):
    heading = "fraction, learned pairs\N{NO-BREAK SPACE}↓"
    values, order, button = _column(page, heading)
    assert order is None
    assert values.count("") == 3  # of the untrained control
    for expected in ("ascending", "descending", "ascending"):
        button.send_keys("\ue007")  # Enter, as from the keyboard
        values, order, button = _column(page, heading)
        numbers = [float(value) for value in values[:-3]]
        assert order == expected
        assert values[-3:] == ["", "", ""]
        assert numbers == sorted(numbers, reverse=order == "descending")
        assert numbers[0] != numbers[-1]


def test_sorting_by_one_column_ends_sorting_by_another(page):
    _column(page, "L0 asked for")[2].click()
    assert _column(page, "L0 asked for")[0] == ["4.0"] * 7 + ["8.0"] * 7 + ["12.0"] * 7
    _column(page, "entry")[2].click()
    values, order, _ = _column(page, "entry")
    assert order == "ascending"
    assert values[-3:] == ["untrained"] * 3
    assert _column(page, "L0 asked for")[1] is None


def test_the_theme_turns_page_and_charts(page):
    def colours():
        return page.execute_script(
            "const of = (e) => getComputedStyle(e);"
            "return [of(document.body).backgroundColor,"
            " of(document.querySelector('#pareto-mcc .xtick text')).fill,"
            " document.getElementById('theme').textContent]"
        )

    light = colours()
    _click(page, "#theme")
    dark = colours()
    assert all(one != other for one, other in zip(light, dark, strict=True))
    page.refresh()
    assert colours() == dark  # the choice is kept
    _click(page, "#theme")
    assert colours() == light


def test_the_theme_follows_the_system(page, address):
    _show(page, address, scheme="dark")
    theme = "return document.documentElement.dataset.theme"
    assert page.execute_script(theme) == "dark"
    light = {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", light)
    told = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
    page.execute_async_script(told)
    assert page.execute_script(theme) == "light"


def test_another_l0_draws_other_curves(page):
    def drawn(chart, part):
        return page.execute_script(f"return document.querySelector('#{chart} {part}').outerHTML")

    choose = (
        "const s = document.querySelector(`select[data-scope=${arguments[0]}]`);"
        "s.value = '12'; s.dispatchEvent(new Event('change'))"
    )
    curve, heatmap = drawn("curve-explained_variance", ".js-line"), drawn("parents", "image")
    page.execute_script(choose, "curves")
    assert drawn("curve-explained_variance", ".js-line") != curve
    assert drawn("parents", "image") == heatmap
    page.execute_script(choose, "parents")
    assert drawn("parents", "image") != heatmap


def test_a_key_hides_its_entry_everywhere(page):
    def lines():
        return page.execute_script(
            "return ['pareto-mcc', 'pareto-f1', 'curve-l0', 'importance-0'].map("
            "(id) => document.querySelectorAll(`#${id} .scatterlayer .trace`).length)"
        )

    before = lines()
    _click(page, ".key[data-entry=topk]")
    pressed = page.execute_script(
        "return [...document.querySelectorAll('.key[data-entry=topk]')].map((k) => k.ariaPressed)"
    )
    assert pressed == ["false", "false"]
    assert lines() == [before[0] - 1, before[1] - 1, before[2] - 1, before[3]]
    _click(page, ".key[data-entry=topk]")
    assert lines() == before


def test_what_is_out_of_view_can_be_shown(page):
    def lowest():
        chart = "document.getElementById('pareto-mcc')"
        return page.execute_script(f"return {chart}._fullLayout.yaxis.range[0]")

    before = lowest()
    _click(page, "[data-widen=pareto-mcc]")
    assert lowest() < 0.1 < before  # the untrained control's is about 0.05
    _click(page, "#theme")
    assert lowest() < 0.1
    _click(page, "[data-widen=pareto-mcc]")
    assert lowest() == before


def test_a_phone_scrolls_only_down(page, address):
    _show(page, address, width=375)
    page.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    width, seen, scroll = page.execute_script(
        "const root = document.documentElement;"
        "return [innerWidth, root.clientWidth, root.scrollWidth]"
    )
    assert width == 375
    assert scroll == seen <= width
    right = page.execute_script(
        "return [...document.querySelectorAll('.main-svg, img, .key, .scroll, pre')]"
        ".map((element) => element.getBoundingClientRect().right)"
    )
    assert max(right) <= seen
    # A table scrolls in its box, and the names stay.
    left = page.execute_script(
        "const box = document.getElementById('rows').parentElement;"
        "box.scrollLeft = 500;"
        "const name = box.querySelector('tbody th').getBoundingClientRect();"
        "return [box.scrollLeft, name.left - box.getBoundingClientRect().left]"
    )
    assert left == [500, 0]
