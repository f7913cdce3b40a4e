"""tools/migrate_results.py, and the committed results."""

import json
from pathlib import Path

import pytest

from sae_lens_atm.compare import read_results
from sae_lens_atm.compare.report.results import write_results
from sae_lens_atm.errors import SettingsError
from tests.compare.sample import sample
from tests.helpers import load_script

ROOT = Path(__file__).parent.parent
COMMITTED = [*ROOT.glob("docs/**/results.json"), *ROOT.glob("benchmarks/study/results/*.json")]

migrate_results = load_script(ROOT / "tools/migrate_results.py")


@pytest.fixture
def old(tmp_path):
    """A results.json of schema 2, in the words of that schema."""
    results = sample()
    results.config["architectures"] = {"atm": {"l0_knob": "k"}, "topk": None}
    results.entries["jumprelu"].l0_parameter = "l0, steered"
    path, _ = write_results(results, tmp_path)
    content = json.loads(path.read_text().replace('"l0_parameter"', '"l0_knob"'))
    content["schema_version"] = 2
    path.write_text(json.dumps(content))
    return path


def test_schema_2_becomes_schema_3(old, tmp_path):
    with pytest.raises(SettingsError, match="migrate_results"):
        read_results(old)
    migrate_results.main([old])
    results = read_results(old)
    assert results.entries["jumprelu"].l0_parameter == "l0, controlled"
    assert results.config["architectures"] == {"atm": {"l0_parameter": "k"}, "topk": None}
    assert not any(run.cosine_map for run in results.runs)
    assert any(run.curve for run in results.runs)
    (tmp_path / "new").mkdir()
    expected = read_results(write_results(sample(), tmp_path / "new")[0])
    assert results.rows == expected.rows
    assert results.tests == expected.tests
    assert [run.figures for run in results.runs] == [run.figures for run in expected.runs]


def test_again_changes_nothing(old):
    migrate_results.main([old])
    text = old.read_text()
    migrate_results.main([old])
    assert old.read_text() == text


def test_a_summary_has_no_values_for_charts_of_runs(old):
    migrate_results.main([old], summary_only=True)
    for run in read_results(old).runs:
        assert (run.curve, run.importance, run.intervals) == (None, None, {})
        assert (run.absorption_by_parent, run.by_task) == ([], {})
        assert run.figures


def test_other_files_are_left_unchanged(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"runs": []}')
    migrate_results.main([path])
    assert path.read_text() == '{"runs": []}'


def test_the_committed_results_are_small_and_readable():
    assert sum(path.stat().st_size for path in COMMITTED) < 5_000_000
    for path in COMMITTED:
        assert path.stat().st_size < 1_000_000, path
        if "schema_version" in json.loads(path.read_text(encoding="utf-8")):
            assert not any(run.cosine_map for run in read_results(path).runs), path
