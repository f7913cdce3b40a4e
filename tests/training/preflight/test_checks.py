import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training import language_model_run
from sae_lens_atm.training.preflight import checks
from sae_lens_atm.training.preflight.checks import check_devices, check_run
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from sae_lens_atm.yaml_files import shipped_config


def error_of(function, *args):
    with pytest.raises(SettingsError) as caught:
        function(*args)
    return str(caught.value)


def test_facts_of_a_run(synthetic_yaml):
    facts = check_run(load_run(synthetic_yaml))
    assert facts["architecture"] == "atm"
    assert facts["d_in, d_sae"] == "16, 32 (1,072 parameters)"
    assert facts["steps"] == "40, each with 64 samples"
    assert facts["output"] == Path("out")
    assert "before step 1" not in facts


def test_the_last_batch_may_go_beyond_the_samples(synthetic_yaml):
    run = load_run(synthetic_yaml, ["training_samples=2561"])
    assert check_run(run)["steps"] == "41, each with 64 samples"
    assert run.runner.total_training_steps == 40


def test_the_memory_of_a_run_counts_its_averages():
    run = load_run(shipped_config("gemma-2-2b-l12-16k"))
    parameters, inputs = 2 * 2304 * 16384 + 16384 + 2304, 2304 * 16384
    # Weights, gradients and the moments of Adam; the mean inputs of parents. The rest is small.
    expected = (4 * 4 * parameters + 4 * inputs) / 2**30
    shown = float(check_run(run)["memory"].split()[0])
    assert shown == pytest.approx(expected, abs=0.06)


def test_batches_before_step_1_are_announced(language_model_yaml):
    more = ["sae.normalize_activations=expected_average_only_in", "n_batches_for_norm_estimate=7"]
    shown = check_run(load_run(language_model_yaml, more))["before step 1"]
    assert shown.startswith("at most 7 batches of 64 ")
    assert shown.endswith(", fewer when the standard error is below 0.1%")
    more[0] = "sae.normalize_activations=covariance_whitening"
    shown = check_run(load_run(language_model_yaml, more))["before step 1"]
    assert shown.endswith("(n_batches_for_norm_estimate)")
    assert "before step 1" not in check_run(load_run(language_model_yaml))


def test_saelens_cached_activations_must_be_there(language_model_yaml):
    more = ["use_cached_activations=true", "cached_activations_path=nowhere"]
    run = load_run(language_model_yaml, more)
    assert error_of(check_run, run).startswith("cached_activations_path is 'nowhere': no such")
    Path("nowhere").mkdir()
    check_run(run)


def test_a_large_buffer_is_named(language_model_yaml):
    run = load_run(language_model_yaml, ["n_batches_in_buffer=1e12"])
    message = error_of(check_run, run)
    assert "with n_batches_in_buffer = 1,000,000,000,000 and store_batch" in message


def test_only_a_dry_run_looks_up_the_model(language_model_yaml, monkeypatch):
    monkeypatch.setattr(checks, "look_up", lambda _: {"checked": "yes"})
    run = load_run(language_model_yaml)
    assert "checked" not in check_run(run)
    assert check_run(run, dry=True)["checked"] == "yes"


def test_a_folder_with_another_run_is_refused(synthetic_yaml):
    run = load_run(synthetic_yaml, ["n_checkpoints=1"])
    train(run)
    assert error_of(check_run, run).startswith("output_path out already holds a finished SAE")
    Path("out/cfg.json").unlink()
    expected = "--resume out/checkpoints, or choose another output_path"
    assert error_of(check_run, run).endswith(expected)


def test_errors_of_checkpoints_elsewhere_name_their_setting(synthetic_yaml):
    train(load_run(synthetic_yaml, ["n_checkpoints=1", "output_path=a", "checkpoint_path=aside"]))
    again = load_run(synthetic_yaml, ["output_path=b", "checkpoint_path=aside"])
    assert error_of(check_run, again).endswith("or choose another checkpoint_path")
    Path("file").touch()
    nowhere = load_run(synthetic_yaml, ["checkpoint_path=file/aside"])
    assert error_of(check_run, nowhere).startswith("checkpoint_path file/aside cannot be written")


@pytest.mark.parametrize("path", ["run.yaml/x", "x" * 5000])
def test_an_output_path_that_cannot_be_written(synthetic_yaml, path):
    run = load_run(synthetic_yaml)
    run.runner.output_path = path
    assert error_of(check_run, run).startswith("output_path ")


def test_data_that_saelens_would_refuse_later(language_model_yaml):
    small = load_run(language_model_yaml, ["n_batches_in_buffer=3"])
    assert error_of(check_run, small).startswith("n_batches_in_buffer must be 4 or more, got 3")
    few = load_run(language_model_yaml, ["seqpos_slice=[0, 4]"])
    assert error_of(check_run, few) == (
        "n_batches_in_buffer must be 16 or more, got 4: times positions in seqpos_slice = 4 it "
        "must reach train_batch_size_tokens = 64"
    )
    strange = load_run(language_model_yaml, ["sequence_separator_token=1000000"])
    assert error_of(check_run, strange).startswith("sequence_separator_token must be a token of")
    nowhere = load_run(language_model_yaml, ["dataset_path=/nonexistent/data"])
    assert error_of(check_run, nowhere).endswith("'/nonexistent/data': no such folder")
    none = load_run(language_model_yaml, ["dataset_path=''"])
    assert error_of(check_run, none).startswith("dataset_path: missing")


@pytest.mark.parametrize(
    ("override", "message"),
    {
        "dtype=float12": "dtype must be one of float32, float64",
        "seqpos_slice=[8, 0]": "seqpos_slice must leave a position of context_size = 16",
        "seqpos_slice=[0, 8, 0]": "seqpos_slice must leave a position",
    }.items(),
)
def test_values_of_a_language_model_run(language_model_yaml, override, message):
    assert error_of(load_run, language_model_yaml, [override]).startswith(message)


@pytest.mark.parametrize("check", [check_run, train])
def test_files_of_a_run_are_checked_before_the_weights_are_read(
    language_model_yaml, gemma_folder, check, monkeypatch
):
    monkeypatch.setattr(language_model_run, "load_language_model", None)
    Dataset.from_list([{"body": "w1 w2"}]).save_to_disk("other")
    Dataset.from_dict({"text": []}).save_to_disk("empty")
    Dataset.from_list([{"text": None}]).save_to_disk("none")
    shutil.copytree(gemma_folder, "untokenized", ignore=shutil.ignore_patterns("token*"))
    for setting, expected in [
        ("hook_name=model.layer.1", "hook_name is 'model.layer.1': no such hook in the model; sim"),
        ("sae.d_in=17", "sae.d_in must be 16, the width of the hook, got 17"),
        ("dataset_path=other", "dataset_path 'other' must have one of the columns tokens, "),
        ("dataset_path=empty", "dataset_path 'empty' has no rows"),
        ("dataset_path=none", "column text of dataset_path 'none' must hold text, got NoneType"),
        ("model_name=untokenized", "model_name is 'untokenized': the folder has no tokenizer"),
        ("model_name=./nowhere", "model_name is './nowhere': no such folder"),
    ]:
        line = error_of(check, load_run(language_model_yaml, [setting]))
        assert line.startswith(expected)
        assert "\n" not in line


@pytest.mark.parametrize("setting", ["sae.d_sae=2**27", "batch_size=2**40"])
def test_a_step_that_does_not_fit_into_memory(synthetic_yaml, setting):
    name, _, power = setting.partition("=2**")
    more = ["training_samples=1e15", f"{name}={2 ** int(power)}"]
    line = error_of(check_run, load_run(synthetic_yaml, more))
    assert line.startswith("sae.d_sae = ")
    assert "TiB of memory, and cpu has " in line or "GiB of memory, and cpu has " in line


def test_a_device_that_torch_knows_and_this_machine_does_not_have(synthetic_yaml):
    run = load_run(synthetic_yaml, ["device=xpu"])
    assert error_of(check_devices, run).startswith("device is 'xpu': ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there(synthetic_yaml):
    run = load_run(synthetic_yaml, ["device=cuda"])
    check_run(run)  # a run can be checked on another machine
    assert error_of(check_devices, run).startswith("device is 'cuda': ")
