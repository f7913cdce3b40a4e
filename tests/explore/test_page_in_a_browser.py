"""The page in a real browser, headless."""

import time

import numpy as np
import pytest
import torch

from sae_lens_atm.explore import explore
from sae_lens_atm.explore.found_parents import FoundParents
from sae_lens_atm.explore.letters import Letter, MissedWord
from sae_lens_atm.explore.over_training import OverTraining
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from tests.browser import open_browser, show, wait_until_drawn
from tests.explore.sample import (
    CHILD,
    DEAD,
    DENSE,
    GRANDCHILD,
    ODD,
    PARENT,
    family,
    reading_of,
    write_sample,
)

DOWN, UP, LEFT, RIGHT, ENTER, END, HOME = (
    "\ue015",
    "\ue013",
    "\ue012",
    "\ue014",
    *"\ue007\ue010\ue011",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = open_browser(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("p") / "page.html", name=f"sae {ODD}").as_uri()


@pytest.fixture
def page(browser, address):
    """The page, new, at a desk's width and in light colours."""
    browser.get("about:blank")  # another fragment alone would not load the page again
    show(browser, address)
    yield browser
    browser.execute_script("localStorage.clear()")


def rows(page):
    """The cells of the rows of the table that are in the document."""
    return page.execute_script(
        "return [...document.querySelectorAll('#table tbody tr:not(.gap)')]"
        ".map((row) => [...row.cells].map((cell) => cell.innerText.trim()))"
    )


def latents(page):
    return [int(row[0]) for row in rows(page)]


def text(page, selector):
    return page.execute_script(
        "return document.querySelector(arguments[0])?.innerText ?? ''", selector
    )


def focus(page, selector):
    """The element with this selector, with the focus."""
    return page.execute_script(
        "const e = document.querySelector(arguments[0]); e.focus(); return e", selector
    )


def focused(page):
    return page.switch_to.active_element


def choose(page, select, value):
    page.execute_script(
        "const s = document.querySelector(arguments[0]); s.value = arguments[1];"
        "s.dispatchEvent(new Event('change'))",
        select,
        value,
    )


def test_nothing_is_loaded_and_nothing_complains(page):
    loaded = page.execute_script(
        "return performance.getEntriesByType('resource').map((e) => e.name)"
    )
    assert all(name.startswith(("data:", "blob:")) for name in loaded)
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert len(rows(page)) == 12
    assert text(page, "#count") == "12 of 12 latents"


def test_an_odd_name_and_an_odd_token_are_shown_as_they_are(page):
    assert page.title.startswith(f"sae {ODD}")
    assert text(page, "h1") == f"sae {ODD}"
    assert ODD in text(page, "#card")
    assert page.execute_script("return document.scripts.length") == 3  # theme, data, scripts


def test_search_finds_tokens_and_numbers(page):
    search = focus(page, "#search")
    search.send_keys("word25")  # suppressed, so it does not count; and a top token of some
    by_token = latents(page)
    assert 0 < len(by_token) < 12
    search.clear()
    search.send_keys("7")
    assert 7 in latents(page)
    search.clear()
    search.send_keys("no such token")
    assert latents(page) == []
    assert text(page, "#count") == "0 of 12 latents"


def test_a_heading_sorts_and_sorts_back(page):
    def by(key):
        focus(page, f"th[data-key={key}] button").send_keys(ENTER)
        order = f"return document.querySelector('th[data-key={key}]').ariaSort"
        return latents(page), page.execute_script(order)

    found, order = by("frequency")
    assert (found[0], order) == (DENSE, "descending")
    found, order = by("frequency")
    assert (found[0], order) == (DEAD, "ascending")
    assert by("index") == ([*range(12)], "ascending")
    found, order = by("absorbed")
    assert (found[0], order) == (PARENT, "descending")


def test_filters(page):
    for name, expected in (
        ("dead latents", [DEAD]),
        ("dense latents", [DENSE]),
        ("absorbed parents", [PARENT]),
        ("latents with children", [PARENT, CHILD]),
    ):
        choose(page, "#filter", name)
        assert set(latents(page)) == set(expected), name


def test_a_click_shows_the_latent(page):
    page.execute_script(f"document.getElementById('row-{CHILD}').click()")
    card = text(page, "#card")
    assert card.startswith(f"Latent {CHILD}")
    assert "Parents (1)" in card
    assert "Children (1)" in card
    assert f"latent {PARENT}" in card
    assert page.current_url.endswith(f"#latent={CHILD}")
    bars, contexts, framed = page.execute_script(
        "return ['svg.chart rect', '.contexts li', '.contexts .at'].map("
        "(s) => document.getElementById('card').querySelectorAll(s).length)"
    )
    assert bars == 20
    assert contexts == framed > 1
    page.execute_script(f"document.getElementById('row-{DEAD}').click()")
    assert "fired on none of the tokens" in text(page, "#card")


def test_an_address_names_a_latent(page, address):
    page.get("about:blank")
    show(page, f"{address}#latent=9")
    assert text(page, "#card h3").strip() == "Latent 9"


def test_the_keyboard_alone_searches_and_walks(page):
    focused(page).send_keys("/")
    focused(page).send_keys("word")
    focused(page).send_keys(DOWN)
    first = latents(page)[0]
    assert text(page, "#card h3").startswith(f"Latent {first}")
    focused(page).send_keys(DOWN)
    assert text(page, "#card h3").startswith(f"Latent {latents(page)[1]}")
    focused(page).send_keys(END)
    assert text(page, "#card h3").startswith(f"Latent {latents(page)[-1]}")
    focused(page).send_keys(HOME)
    focused(page).send_keys(ENTER)
    assert page.execute_script(
        "return document.getElementById('card').contains(document.activeElement)"
    )


def test_the_tree_is_walked_with_the_keyboard(page):
    root = focus(page, "#tree > li")
    assert root.get_attribute("aria-expanded") == "false"
    root.send_keys(RIGHT)
    root.send_keys(RIGHT)
    child = focused(page)
    assert child.get_attribute("data-latent") == str(CHILD)
    child.send_keys(ENTER)
    assert text(page, "#pair h3") == f"latent {CHILD} is a child of latent {PARENT}"
    assert child.get_attribute("aria-selected") == "true"
    child.send_keys(RIGHT)
    child.send_keys(DOWN)
    assert focused(page).get_attribute("data-latent") == str(GRANDCHILD)
    focused(page).send_keys(LEFT)
    focused(page).send_keys(LEFT)
    focused(page).send_keys(LEFT)
    assert focused(page).get_attribute("data-latent") == str(PARENT)
    assert (
        page.execute_script("return document.querySelectorAll('#tree [tabindex=\"0\"]').length")
        == 1
    )


def test_absorption_is_visible(page):
    page.execute_script("document.querySelector('#strongest button').click()")
    pair = text(page, "#pair")
    assert pair.startswith(f"latent {CHILD} is a child of latent {PARENT}")
    assert "80%, 8 tokens" in pair
    assert "Where the parent should have fired and did not" in pair
    assert "Where both fire" in pair
    at_absorbed, at_both = page.execute_script(
        "return [...document.querySelectorAll('#pair .contexts')].map("
        "(list) => [...list.querySelectorAll('.at')].map((at) => 'parent' in at.dataset))"
    )
    assert set(at_absorbed) == {False}
    assert set(at_both) == {True}


def test_an_sae_without_pairs_says_so(page, tmp_path):
    reading = reading_of(np.eye(4)[np.arange(40) % 4])
    show(page, write_sample(tmp_path / "page.html", reading, promoted=False).as_uri())
    assert text(page, "#no-pairs") == "There are no parents and children to show."
    assert text(page, "#tree") == ""
    assert "promotes" not in text(page, "#card")
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_letters_show_which_latent_absorbed_a_word(page, tmp_path):
    assert not page.execute_script("return document.getElementById('letters').checkVisibility()")
    missed = [
        MissedWord(ODD, CHILD, 0.6, absorbed=True),
        MissedWord("also", 7, 0.2, absorbed=False),
    ]
    letters = [
        Letter("a", 0.9, [PARENT, 6], 10, 2, 1, 0.3, missed),
        Letter("b", 0.8, [9], 5, 0, 0, 0.0, []),
    ]
    show(page, write_sample(tmp_path / "page.html", letters=letters).as_uri())
    assert text(page, "#letters-table tbody tr").split() == [
        "a",
        "latent",
        "0",
        "latent",
        "6",
        "10",
        "2",
        "1",
    ]
    lines = text(page, "#letter tbody").splitlines()
    assert lines[0].split("\t")[0] == ODD
    assert "60%" in lines[0]
    assert lines[0].endswith("absorbed")
    focus(page, "#letters-table tbody tr:nth-child(2) th button").send_keys(ENTER)
    assert text(page, "#letter h3") == "The letter B: missed words"
    focus(page, "#letters-table tbody td button").send_keys(ENTER)
    assert text(page, "#card h3").startswith(f"Latent {PARENT}")
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_two_saes_are_side_by_side(page, tmp_path):
    other = family()
    order = torch.tensor([*range(1, 12), 0])  # its latent j is our latent j + 1
    other = reading_of(other.acts.toarray()[:, order], other.decoder[order])
    other.decoder[7] = -torch.eye(12)[8]  # our latent 8 is in no row of the other
    show(page, write_sample(tmp_path / "page.html", beside=other).as_uri())
    choose(page, "#filter", "latents without a match")
    assert latents(page) == [8]
    choose(page, "#filter", "all latents")
    page.execute_script(f"document.getElementById('row-{PARENT}').click()")
    assert "Match in other" in text(page, "#card")
    both = page.execute_script(
        "return [...document.querySelectorAll('#card .contexts .at')].map("
        "(at) => 'child' in at.dataset && 'parent' in at.dataset)"
    )
    assert set(both) == {True}  # the match fires where the latent does
    only, _ = page.execute_script(
        "return [...document.querySelectorAll('#beside-lists > div')].map((d) => d.innerText)"
    )
    assert "1 of the 11 latents that fire have no match in other" in only
    choose(page, "#sae", "1")
    page.execute_script("document.querySelector('#beside-lists button').click()")
    assert page.execute_script("return document.getElementById('sae').value") == "0"
    assert text(page, "#card h3").strip() == "Latent 8"
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_samples_show_their_true_features(page, synthetic_yaml, tmp_path):
    run = load_run(synthetic_yaml)
    train(run)
    show(page, explore("out", run, tmp_path / "page.html", 3000).as_uri())
    assert "top features" in text(page, "#table thead")
    names = page.execute_script(
        "return [...document.querySelectorAll('#card .contexts .token')].map((t) => t.innerText)"
    )
    assert names
    assert all(name.startswith("lone ") or set(name) <= set("0123.") for name in names)
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_theme_turns_and_is_kept(page):
    def colours():
        return page.execute_script(
            "const of = (s) => getComputedStyle(document.querySelector(s));"
            "return [of('body').backgroundColor, of('thead th').backgroundColor,"
            " of('svg.chart rect').fill]"
        )

    light = colours()
    focus(page, "#theme").send_keys(ENTER)
    dark = colours()
    assert all(one != other for one, other in zip(light, dark, strict=True))

    def is_kept():
        if colours() == light:
            focus(page, "#theme").send_keys(ENTER)
        page.refresh()
        wait_until_drawn(page)
        return colours() == dark

    # Chromium loses what it stores while its storage is still starting, on a busy machine.
    assert any(is_kept() for _ in range(10))


def test_a_phone_scrolls_only_down(page, address):
    show(page, address, width=375)
    seen, scroll = page.execute_script(
        "const root = document.documentElement; return [root.clientWidth, root.scrollWidth]"
    )
    assert scroll == seen <= 375


def test_16k_latents_open_in_3_seconds(page, tmp_path):
    """And only the rows in view are in the document."""
    number = 16_384
    random = np.random.default_rng(0)
    acts = random.random((400, number), dtype=np.float32)
    acts[acts < 0.98] = 0
    reading = reading_of(acts, torch.from_numpy(random.standard_normal((number, 32), np.float32)))
    parents = np.full((number, 8), -1)
    parents[8:, 0] = np.arange(8, number) // 8
    path = write_sample(tmp_path / "page.html", reading, found=FoundParents(parents, "it"))
    start = time.monotonic()
    show(page, path.as_uri())
    assert time.monotonic() - start < 3
    assert text(page, "#count") == "16,384 of 16,384 latents"
    assert 10 < len(rows(page)) < 60
    focus(page, "#table").send_keys(END)
    assert text(page, "#card h3").startswith(f"Latent {latents(page)[-1]}")
    start = time.monotonic()
    focus(page, "th[data-key=mean] button").send_keys(ENTER)
    assert len(latents(page)) > 10
    assert time.monotonic() - start < 1


def test_importance_and_masking_over_training(browser, tmp_path):
    points = 5
    importance = np.full((12, points), 200, np.uint8)
    importance[CHILD] = [0, 1, 100, 150, 255]
    masked = np.zeros((12, points), np.uint8)
    masked[CHILD] = [0, 255, 255, 0, 0]
    steps = np.array([10, 20, 30, 40, 1050], np.uint32)
    record = OverTraining(steps, importance, masked, np.array([0, 1, 1, 2, 2], np.float32))
    path = write_sample(tmp_path / "page.html", over_training=record)
    show(browser, f"{path.as_uri()}#latent={CHILD}")
    label = browser.execute_script(
        "return document.querySelector('svg.curve').getAttribute('aria-label')"
    )
    assert label == (
        f"At the end, latent {CHILD} has an importance of about 1,000. "
        "Its mean probability of being masked is 40%"
    )
    line = browser.execute_script(
        "return document.querySelector('svg.curve .importance').getAttribute('d')"
    )
    assert line.count("M") == 1  # the first point has no importance, and the line starts behind it
    assert line.count("L") == 3
    drawn = "return document.querySelector('svg.curve').textContent"
    assert "1,050" in browser.execute_script(drawn)
    show(browser, write_sample(tmp_path / "other.html").as_uri())
    assert "Over training" not in text(browser, "#card")
