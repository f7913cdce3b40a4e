import shutil

import pytest

from sae_lens_atm.compare import load_comparison
from sae_lens_atm.compare.plan.planned_run import settings_of, spelling_lm_folder, stored_in
from sae_lens_atm.data.spelling.model import SpellingLMConfig


def keys(path, *overrides):
    comparison = load_comparison(path, overrides)
    return {p.label: (p.training_key, p.evaluation_key) for p in comparison.planned}


def test_tokens_held_out_for_evaluation_belong_to_the_training(language_model_comparison_yaml):
    before = keys(language_model_comparison_yaml)
    after = keys(language_model_comparison_yaml, "n_eval_batches=3")
    assert all(before[label][0] != after[label][0] for label in before)


@pytest.mark.parametrize("override", ["lr=1e-3", "hierarchy_model.coverage=0.4", "batch_size=32"])
def test_a_change_for_all_changes_all_keys(comparison_yaml, override):
    before, after = keys(comparison_yaml), keys(comparison_yaml, override)
    changed = {label for label in before if before[label] != after[label]}
    expected = {label for label in before if override != "lr=1e-3" or "jumprelu" not in label}
    assert changed == expected


def test_a_change_of_one_entry_changes_its_keys_alone(comparison_yaml):
    before = keys(comparison_yaml)
    after = keys(comparison_yaml, "architectures.atm.sae.schedule_steps=20")
    assert {label.split(",")[0] for label in before if before[label] != after[label]} == {"atm"}


def test_evaluation_and_filing_do_not_change_what_is_trained(comparison_yaml):
    before = keys(comparison_yaml)
    evaluated = keys(comparison_yaml, "eval_samples=600")
    moved = keys(comparison_yaml, "output_path=elsewhere", "curve_points=2")
    for label, (training, evaluation) in before.items():
        assert evaluated[label][0] == training
        assert evaluated[label][1] != evaluation
        assert moved[label] == (training, evaluation)


def test_other_content_at_a_path_changes_all_keys(
    language_model_comparison_yaml, gemma_folder, tmp_path
):
    model = shutil.copytree(gemma_folder, tmp_path / "model")
    override = f"model_name={model}"
    before = keys(language_model_comparison_yaml, override)
    assert keys(language_model_comparison_yaml) == before  # the same files
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    after = keys(language_model_comparison_yaml, override)
    assert all(before[label][0] != after[label][0] for label in before)


def test_another_synthetic_model_in_a_folder_has_other_batches(comparison_yaml, tmp_path):
    def planned():
        overrides = ["hierarchy_model=null", f"synthetic_model={tmp_path / 'model'}"]
        return load_comparison(comparison_yaml, overrides).planned[0]

    (tmp_path / "model").mkdir()
    (tmp_path / "model/a").write_text("1")
    before = planned().data_key, planned().training_key
    (tmp_path / "model/a").write_text("2")
    after = planned().data_key, planned().training_key
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_more_seeds_leave_the_others_alone(comparison_yaml):
    before, after = keys(comparison_yaml), keys(comparison_yaml, "seeds=[0, 1, 2]")
    assert before.items() <= after.items()


def test_runs_of_one_seed_share_their_batches(comparison_yaml):
    by_seed = {}
    for planned in load_comparison(comparison_yaml).planned:
        by_seed.setdefault(planned.seed, set()).add(planned.data_key)
    assert [len(found) for found in by_seed.values()] == [1, 1]
    assert by_seed[0] != by_seed[1]


def test_a_run_is_stored_in_a_folder_without_changing_the_plan(comparison_yaml, tmp_path):
    planned = load_comparison(comparison_yaml, ["max_bad_batches=3"]).planned[0]
    stored = stored_in(planned, tmp_path / "here")
    assert stored.run.runner.output_path == str(tmp_path / "here/sae")
    assert stored.run.runner.checkpoint_path == str(tmp_path / "here/checkpoints")
    assert stored.run.max_bad_batches == 3
    assert planned.run.runner.output_path == "out"
    assert stored.training_key == planned.training_key


def test_a_language_model_run_keeps_its_settings_in_another_folder(
    language_model_comparison_yaml, tmp_path
):
    planned = load_comparison(language_model_comparison_yaml, ["max_bad_batches=3"]).planned[0]
    stored = stored_in(planned, tmp_path)
    assert stored.run.max_bad_batches == 3
    assert stored.run.runner.output_path == str(tmp_path / "sae")


def test_settings_leave_out_what_differs_between_runs(comparison_yaml):
    planned = {(p.entry, p.l0, p.seed): p for p in load_comparison(comparison_yaml).planned}
    atm, jumprelu = (settings_of(planned[name, 2, 0]) for name in ("atm", "jumprelu"))
    assert atm == settings_of(planned["atm", 3, 1])
    assert not {"k", "mask_seed", "metadata"} & atm["sae"].keys()
    assert atm["trained"]
    # of a controlled parameter the start is a setting
    assert jumprelu["sae"]["l0_coefficient"] == 0.01
    assert jumprelu["trainer"]["lr"] == 3e-3
    assert not settings_of(planned["untrained", 2, 0])["trained"]


def test_names_are_unique_and_fit_a_file_system(comparison_yaml):
    entry = "a/b " * 60
    overrides = [f"architectures={{'{entry}': {{architecture: topk}}, topk: {{}}}}"]
    planned = load_comparison(comparison_yaml, overrides).planned
    assert len({p.folder for p in planned}) == len(planned) == 8
    for p in planned:
        assert "/" not in p.name
        assert len(p.name) < 140


def test_a_language_model_has_a_folder_of_its_settings(tmp_path):
    folders = {
        spelling_lm_folder(tmp_path, SpellingLMConfig(seed=seed, steps=steps))
        for seed in (0, 1)
        for steps in (2, 3)
    }
    assert len(folders) == 4
    assert {folder.parent for folder in folders} == {tmp_path / "models"}
