"""Tables of README and docs are drawn from the committed results, and links lead somewhere."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers import load_script

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def tables():
    return load_script("tools/redraw_tables.py")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_drawing_again_changes_nothing(tables, page):
    text = page.read_text(encoding="utf-8")
    assert tables.redraw(text) == text


def test_every_marked_table_is_drawn(tables):
    """No mark has a typing error that hides its table."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    counts = [text.count("<!-- end -->") for text in texts if "<!-- counts -->" not in text]
    found = [tables.MARKED.findall(text) for text in texts if "<!-- counts -->" not in text]
    assert [len(each) for each in found] == counts
    assert {kind for each in found for kind, _, _ in each} == tables.KINDS.keys()


def test_a_changed_figure_changes_the_page(tables, tmp_path, monkeypatch):
    path = "docs/spelling-lm/results.json"
    content = json.loads((ROOT / path).read_text("utf-8"))
    for row in content["rows"]:
        if row["entry"] == "atm":
            row["figures"]["absorption_fraction"]["mean"] = 0.123
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(json.dumps(content))
    page = tmp_path / "docs/page.md"
    old = "\n\nold\n\n<!-- end -->\n"
    text = f"<!-- table: {path} -->{old}<!-- spelling -->{old}"
    page.write_text(text)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "PAGES", [page])
    app = tables.typer.Typer()
    app.command()(tables.main)
    assert CliRunner().invoke(app, ["--check"]).exit_code == 1
    assert page.read_text() == text
    assert CliRunner().invoke(app).output == "docs/page.md: redrawn\n"
    assert len(re.findall(r"\b0\.123\b", page.read_text())) == 6  # three values of L0, twice
    assert CliRunner().invoke(app, ["--check"]).exit_code == 0


TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    anchors = {
        path: {
            re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
        }
        for path in TEXTS
    }
    links = re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]+))?\)", page.read_text("utf-8"))
    assert links or page.stem == "splicing"
    for target, anchor in links:
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors[path], (target, anchor)
