"""`training.html` in a real browser, headless."""

import pytest

from sae_lens_atm.training.curves_page import curves_html
from tests.browser import open_browser

ODD = "<script>document.title='odd'</script>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = open_browser(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, tmp_path):
    rows = [{"step": step, "loss": 1 / step, "l0": 4.0} for step in range(1, 101)]
    path = tmp_path / "training.html"
    path.write_text(curves_html(ODD, {"architecture": ODD}, rows), encoding="utf-8")
    browser.get("about:blank")
    browser.set_window_size(1280, 800)
    browser.get(path.as_uri())
    yield browser
    browser.execute_script("localStorage.clear()")


def test_nothing_is_loaded_and_names_are_shown_as_they_are(page):
    loaded = page.execute_script("return performance.getEntriesByType('resource').length")
    assert loaded == 0
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert page.find_element("tag name", "h1").text == ODD
    assert page.title != "odd"
    titles = [heading.text for heading in page.find_elements("tag name", "h3")]
    assert titles == ["loss", "L0"]


def test_curves_lie_in_their_charts(page):
    boxes = page.execute_script(
        "return [...document.querySelectorAll('svg')].map((svg) => {"
        "const [a, b] = [svg.getBoundingClientRect(), "
        "svg.querySelector('.curve').getBoundingClientRect()];"
        "return [b.left - a.left, b.top - a.top, a.right - b.right, a.bottom - b.bottom] })"
    )
    assert len(boxes) == 2
    assert all(margin >= -1 for box in boxes for margin in box)


def test_the_theme_by_keyboard(page):
    light = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    page.find_element("id", "theme").send_keys("\ue007")
    dark = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert dark != light
    assert page.find_element("id", "theme").text == "Light theme"


def test_a_phone_scrolls_only_down(page):
    size = {"width": 375, "height": 700, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    seen, scroll = page.execute_script(
        "const root = document.documentElement; return [root.clientWidth, root.scrollWidth]"
    )
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert scroll == seen <= 375
