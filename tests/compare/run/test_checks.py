"""Models and data of a comparison are checked before anything is trained."""

import shutil

import pytest
from datasets import Dataset

from sae_lens_atm.compare import compare, dry_run, load_comparison
from sae_lens_atm.compare.run import checks, comparison
from sae_lens_atm.compare.run.checks import check
from sae_lens_atm.errors import SettingsError
from tests.compare.run.test_comparison import Events


def checks_of(path, *settings):
    """Return the error of each way to begin a comparison."""
    planned = load_comparison(path, settings)
    for begin in (lambda: check(planned), lambda: dry_run(planned, 1)):
        with pytest.raises(SettingsError) as caught:
            begin()
        yield str(caught.value)
    with pytest.raises(SettingsError) as caught:
        compare(planned, 1, Events())
    yield str(caught.value)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("hook_name=model.layer.1", "hook_name is 'model.layer.1': no such hook in the model; sim"),
        ("sae.d_in=17", "sae.d_in must be 16, the width of the hook, got 17"),
        ("context_size=65", "context_size must be at most 64, the positions of "),
        ("dataset_path=other", "dataset_path 'other' must have one of the columns tokens, "),
        ("dataset_path=./nowhere", "dataset_path is './nowhere': no such folder"),
        ("model_name=untokenized", "model_name is 'untokenized': the folder has no tokenizer"),
        ("model_name=./nowhere", "model_name is './nowhere': no such folder"),
    ],
)
def test_what_does_not_fit_is_an_error_of_one_line(
    language_model_comparison_yaml, gemma_folder, setting, expected, monkeypatch
):
    monkeypatch.setattr(comparison, "run_jobs", None)  # nothing is trained
    Dataset.from_list([{"body": "w1 w2"}]).save_to_disk("other")
    shutil.copytree(gemma_folder, "untokenized", ignore=shutil.ignore_patterns("token*"))
    more = ["n_batches_in_buffer=16"]  # for the longer context
    for line in checks_of(language_model_comparison_yaml, setting, *more):
        assert line.startswith(expected)
        assert "\n" not in line


def test_a_sweep_is_checked_as_well(language_model_yaml):
    from sae_lens_atm.compare.plan.sweep_file import load_sweep

    over = ["sweep.over={lr: [1.0e-2, 1.0e-3]}", "hook_name=model.layer.1"]
    with pytest.raises(SettingsError, match="no such hook in the model; similar names"):
        check(load_sweep(language_model_yaml, over))


def test_a_model_for_all_runs_is_looked_up_once(language_model_comparison_yaml, monkeypatch):
    looked_up = []

    def look_up(cfg):
        looked_up.append(cfg.hook_name)
        return {"checked": "yes", "columns": "text", "memory": "1 GiB for one SAE"}

    monkeypatch.setattr(checks, "look_up", look_up)
    facts = check(load_comparison(language_model_comparison_yaml))
    assert looked_up == ["model.layers.1"]
    assert facts == {"checked": "yes", "columns": "text"}


def test_a_synthetic_comparison_has_no_model_to_look_up(comparison_yaml):
    assert check(load_comparison(comparison_yaml)) == {}


def test_text_for_a_cache_that_is_not_written_yet_must_exist(language_model_comparison_yaml):
    settings = ["activations={cache: cached}", "dataset_path=./nowhere"]
    planned = load_comparison(language_model_comparison_yaml, settings)
    with pytest.raises(SettingsError, match=r"^dataset_path is './nowhere': no such folder"):
        check(planned)
