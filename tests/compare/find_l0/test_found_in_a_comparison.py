"""`l0: found` in a comparison file: every entry at the L0 that its own search found."""

import json
from pathlib import Path

import pytest

from sae_lens_atm.compare import load_comparison
from sae_lens_atm.compare.evaluate_saved import data_of
from sae_lens_atm.compare.find_l0 import load_searches
from sae_lens_atm.compare.find_l0.searches import search_key
from sae_lens_atm.compare.plan.any_file import runs_in
from sae_lens_atm.compare.plan.sweep_file import load_sweep
from sae_lens_atm.compare.report.html import report_html
from sae_lens_atm.compare.report.results import FOUND_LEVEL
from sae_lens_atm.compare.report.tables import markdown, row_tables
from sae_lens_atm.compare.run.comparison import compare
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.found_l0 import FILENAME, SCHEMA
from tests.compare.silent import Silent

L0S = {"atm": 2.3721, "topk": 2.6, "jumprelu": 3.0}


def write_answers(path, comparison_yaml, l0s):
    searches = load_searches(comparison_yaml).searches
    keys = {one.entry: search_key(one) for one in searches}
    path.parent.mkdir(exist_ok=True)
    entries = {name: {"l0": l0} for name, l0 in l0s.items()}
    path.write_text(json.dumps({"schema": SCHEMA, "name": "x", "keys": keys, "entries": entries}))


@pytest.fixture
def searched(comparison_yaml):
    write_answers(Path("out-l0") / FILENAME, comparison_yaml, L0S)
    return comparison_yaml


def test_each_entry_has_its_own_l0(searched):
    planned = load_comparison(searched, ["l0=found"]).planned
    assert {p.entry: p.l0 for p in planned} == {
        "atm": 2.37,
        "topk": 3,  # a whole number
        "jumprelu": 3,
        "untrained": 2,  # that of the first entry to train, and its own k is whole
    }
    assert {p.entry: p.run.runner.sae.k for p in planned if p.entry != "jumprelu"} == {
        "atm": 2.37,
        "topk": 3,
        "untrained": 2,
    }
    assert {p.level for p in planned} == {FOUND_LEVEL}
    assert len(planned) == 4 * 2  # two seeds


def test_answers_of_another_version_are_refused(searched):
    answers = Path("out-l0") / FILENAME
    answers.write_text(json.dumps({**json.loads(answers.read_text()), "schema": 1}))
    with pytest.raises(SettingsError, match=r"found_l0.json is of another version: run"):
        load_comparison(searched, ["l0=found"])


def test_a_file_elsewhere(searched):
    Path("out-l0").rename("elsewhere")
    planned = load_comparison(searched, [f"l0=elsewhere/{FILENAME}"]).planned
    assert planned[0].l0 == 2.37


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["l0=found", "output_path=other"], r"^l0 is 'found', but other-l0/found_l0.json cannot"),
        (["l0=nowhere.json"], r"^l0 is 'nowhere.json', but nowhere.json cannot be read"),
        (["l0=found", "sae.d_sae=33"], "has no answer for 'atm' with this architecture, width"),
        (["l0=found", "architectures.topk.sae={d_sae: 33}"], "has no answer for 'topk'"),
        (["l0=found", "architectures.batchtopk={}"], "has no answer for 'batchtopk'"),
        (["l0=out-l0"], r"^l0 is 'out-l0', but out-l0 cannot be read"),
        (["l0=''"], r"^l0 is '', but \. cannot be read"),
        (["l0=small.yaml"], r"but small.yaml cannot be read"),
        (["l0=found", "spelling_lm={}"], "l0: with spelling_lm it must be a list"),
    ],
)
def test_mistakes_are_one_line(searched, overrides, message):
    with pytest.raises(SettingsError, match=message) as caught:
        load_comparison(searched, overrides)
    assert "\n" not in str(caught.value)


def answers_with(**fields):
    path = Path("out-l0") / FILENAME
    content = json.loads(path.read_text())
    content["entries"]["topk"] |= fields
    path.write_text(json.dumps(content))


@pytest.mark.usefixtures("searched")
def test_an_l0_at_the_edge_is_refused(comparison_yaml):
    answers_with(at_edge=True, l0=8, problems=["the peak is at the largest L0 tried, 8"])
    message = r"^l0 is 'found', but the search found no peak for 'topk': .* L0s tried, 8\. Set a"
    with pytest.raises(SettingsError, match=message):
        load_comparison(comparison_yaml, ["l0=found"])


@pytest.mark.usefixtures("searched")
def test_an_unsure_l0_warns(comparison_yaml):
    answers_with(problems=["one seed: the error is unknown", "train longer"])
    message = "not sure of L0 2.6 for 'topk': one seed: the error is unknown; train longer"
    with pytest.warns(UserWarning, match=message):
        assert load_comparison(comparison_yaml, ["l0=found"]).planned


def test_quick_needs_a_list(searched):
    with pytest.raises(SettingsError, match="l0: --quick needs a list, name it under `quick`"):
        load_comparison(searched, ["l0=found", "quick={training_samples: 640}"], quick=True)
    searched.write_text(searched.read_text().replace("l0: [2, 3]", "l0: found"))
    assert load_comparison(searched).planned[0].is_found
    assert load_comparison(searched, quick=True).planned[0].l0 == 2  # its own list


def test_commands_that_only_need_the_data_do_not_need_the_search(comparison_yaml):
    assert len(runs_in(comparison_yaml, ["l0=found"])) == 8
    assert data_of(str(comparison_yaml), ["l0=found"]).run.runner.sae.d_in == 16


def test_a_sweep_refuses_it(searched):
    overrides = ["l0=found", "sweep={over: {sae.mask_rate: [0, 1]}}"]
    with pytest.raises(SettingsError, match="l0: a sweep takes a list of L0s"):
        load_sweep(searched, overrides)


def test_the_results_stand_side_by_side(searched):
    comparison = load_comparison(searched, ["l0=found"])
    results = compare(comparison, 2, Silent(), threads=1)
    assert results.failed == {}
    assert len(results.runs) == 8
    assert {run.l0_target for run in results.runs} == {FOUND_LEVEL}
    # An SAE is matched if it has the L0 that was found for it.
    (topk,) = {run.matched for run in results.runs if run.entry == "topk"}
    assert topk
    assert {name: entry.found_l0 for name, entry in results.entries.items()} == {
        "atm": 2.37,
        "topk": 3,
        "jumprelu": 3,
        "untrained": 2,
    }
    assert len(results.rows) == 4
    assert all(row.figures["stability"].n == 1 for row in results.rows if row.entry != "untrained")
    (table,) = row_tables(results)
    assert "L0 found" in str(table.title)
    assert "| L0 found |" in markdown(results)
    assert "L0 found" in report_html(results)
