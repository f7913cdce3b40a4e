"""The page in a real browser, headless."""

import json

import pytest

from sae_lens_atm.compare.report import html as report
from tests.browser import open_browser, show, wait_until_drawn
from tests.compare.sample import ODD, sample_sweep


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = open_browser(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory, comparison):
    return report.write_report(comparison, tmp_path_factory.mktemp("r") / "report.html").as_uri()


@pytest.fixture
def page(browser, address):
    """The page, new, at a desk's width and in light colours."""
    show(browser, address)
    yield browser
    browser.execute_script("localStorage.clear()")


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
    _column(page, "target L0")[2].click()
    assert _column(page, "target L0")[0] == ["4.0"] * 7 + ["8.0"] * 7 + ["12.0"] * 7
    _column(page, "entry")[2].click()
    values, order, _ = _column(page, "entry")
    assert order == "ascending"
    assert values[-3:] == ["untrained"] * 3
    assert _column(page, "target L0")[1] is None


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
    wait_until_drawn(page)
    assert colours() == dark  # the choice is kept
    _click(page, "#theme")
    assert colours() == light


def test_the_theme_follows_the_system(page, address):
    show(page, address, scheme="dark")
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
    show(page, address, width=375)
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


def test_a_sweep_is_drawn(page, tmp_path):
    show(page, report.write_report(sample_sweep(), tmp_path / "sweep.html").as_uri())
    points = page.execute_script(
        "return [0, 1, 2].map((i) => document.querySelectorAll(`#sweep-${i} .point`).length)"
    )
    assert points == [7, 6, 6]
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_single_l0_is_in_the_middle_of_the_axis(page, comparison, tmp_path):
    one = {
        part: [held for held in getattr(comparison, part) if held.l0_target == 4]
        for part in ("rows", "runs", "tests")
    }
    path = report.write_report(comparison.model_copy(update=one), tmp_path / "one.html")
    show(page, path.as_uri())
    ticks = page.execute_script(
        "return [...document.querySelectorAll('#pareto-mcc .xtick text')].map((t) => t.textContent)"
    )
    assert "4" in ticks
    assert len(ticks) > 2


def test_text_has_the_width_of_the_page(page):
    page_width, text_width = page.execute_script(
        "return [document.querySelector('main'), document.querySelector('main > p:last-of-type')]"
        ".map((element) => element.getBoundingClientRect().width)"
    )
    assert text_width == page_width


def test_an_old_browser_shows_the_tables(page, address):
    """Without DecompressionStream the page says that there are no charts."""
    without = {"source": "delete window.DecompressionStream"}
    script = page.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", without)
    try:
        page.get(address)
        notice = "return !document.getElementById('no-charts').hidden"
        assert page.execute_script(notice)
        assert len(_column(page, "target L0")[0]) == 21
        _click(page, "#theme")
    finally:
        page.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
