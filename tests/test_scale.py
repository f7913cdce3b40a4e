"""The benchmark of several processes, and the page drawn from its measurements."""

import json
from pathlib import Path

import pytest

from tests.helpers import load_script

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scaling():
    return load_script("benchmarks/scaling.py")


def test_the_tables_are_those_of_the_figures(scaling):
    page = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "docs/scale/scaling.json").read_text())
    for name in ("table", "sharded", "carried"):
        marked = f"<!-- {name}: docs/scale/scaling.json -->\n\n{getattr(scaling, name)(found)}\n\n"
        assert marked + "<!-- end -->" in page


def test_the_traffic_counted_is_that_of_the_formula(scaling):
    found = json.loads((ROOT / "docs/scale/scaling.json").read_text())
    for shape, (_, *sizes) in scaling.SHAPES.items():
        for name, cfg in scaling.contenders(*sizes).items():
            assert found[f"{shape}, {name}"]["bytes"] == scaling.traffic(cfg)
