import json
from pathlib import Path

from tests.helpers import load_script

ROOT = Path(__file__).parents[2]


def load_soak():
    return load_script("benchmarks/soak.py")


def test_the_page_has_the_counts():
    found = json.loads((ROOT / "docs/reliability/soak.json").read_text())
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    assert f"<!-- counts -->\n{load_soak().report(found)}<!-- end -->" in page


def test_a_short_soak(tmp_path):
    load_soak().main(runs=1, damages=4, json_path=tmp_path / "soak.json", report_path=None)
    found = json.loads((tmp_path / "soak.json").read_text())
    assert (found["runs"], found["identical"], found["states_lost"]) == (1, 1, 0)
    assert sum(found["damages"]["tried"].values()) == found["damages"]["noticed"] == 4
