import csv
import json

import pytest

from sae_lens_atm.compare.report.results import SCHEMA_VERSION, read_results, write_results
from sae_lens_atm.errors import SettingsError
from tests.compare.sample import measured_on_words, sample


def test_results_come_back_as_they_were_written(tmp_path):
    results = sample()
    json_path, csv_path = write_results(results, tmp_path)
    again = read_results(json_path)
    assert write_results(again, tmp_path / "..")[0].read_text() == json_path.read_text()
    assert again.entries == results.entries
    assert [run.folder for run in again.runs] == [run.folder for run in results.runs]
    assert not list(tmp_path.glob(".*"))
    with csv_path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results.runs)
    for row, run in zip(rows, results.runs, strict=True):
        assert (row["entry"], int(row["seed"])) == (run.entry, run.seed)
        for name, value in run.figures.items():
            assert row[name] == ("" if value is None else str(value))


def test_intervals_come_back_and_are_columns_of_the_csv(tmp_path):
    results = measured_on_words()
    results.runs[2].intervals["l0_words"] = (None, None)
    json_path, csv_path = write_results(results, tmp_path)
    again = read_results(json_path)
    assert again.runs == results.runs
    assert again.rows[1].intervals == results.rows[1].intervals
    assert again.absorption_metric == "SAEBench 0.6.0"
    with csv_path.open(newline="") as file:
        first, _, last = csv.DictReader(file)
    assert (first["absorption_fraction_low"], first["l0_words_high"]) == ("0.08", "4.1")
    assert (last["l0_words_low"], last["l0_words_high"]) == ("", "")


def test_lists_of_numbers_and_innermost_objects_take_a_line(tmp_path):
    path, _ = write_results(sample(), tmp_path)
    lines = path.read_text().splitlines()
    assert any('"mcc": { "mean": ' in line and '"n": 3 }' in line for line in lines)
    assert any('"steps": [' in line and line.count(",") > 5 for line in lines)


def test_nan_is_null_in_json_and_empty_in_csv(tmp_path):
    results = sample()
    results.runs[0].figures["mcc"] = float("nan")
    json_path, csv_path = write_results(results, tmp_path)
    assert json.loads(json_path.read_text())["runs"][0]["figures"]["mcc"] is None
    with csv_path.open(newline="") as file:
        assert next(csv.DictReader(file))["mcc"] == ""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSON"),
        ("[]", "not a results.json"),
        ('{"name": 3}', "name"),
        (None, "cannot read"),
    ],
)
def test_a_file_that_is_not_results_is_an_error(tmp_path, content, reason):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SettingsError, match=reason) as caught:
        read_results(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("version", "advice"), [(2, r"tools/migrate_results\.py"), (SCHEMA_VERSION + 1, "")]
)
def test_another_schema_version_is_refused(tmp_path, version, advice):
    path, _ = write_results(sample(), tmp_path)
    content = json.loads(path.read_text())
    content["schema_version"] = version
    path.write_text(json.dumps(content))
    with pytest.raises(SettingsError, match=f"schema_version.*{advice}") as caught:
        read_results(path)
    assert len(str(caught.value).splitlines()) == 1


def test_text_with_braces_and_line_breaks_comes_back(tmp_path):
    results = sample()
    results.config["note"] = "{ a\n  b: [1,\n 2] }"
    path, _ = write_results(results, tmp_path)
    assert read_results(path).config["note"] == results.config["note"]
