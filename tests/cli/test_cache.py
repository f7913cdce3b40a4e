import os
import signal

import pytest

from sae_lens_atm.data import cache_writer
from sae_lens_atm.data.cache_writer import is_complete
from sae_lens_atm.training import cached_run
from tests.cli.command import run

CACHE = ("--set", "activations={cache: cached, tokens: 1600}")


def test_cache_then_train(language_model_yaml):
    plan = run("cache", language_model_yaml, *CACHE, "--dry-run")
    assert plan.exit_code == 0, plan.output
    for text in ("1,600 in 100 contexts of 16", "56.2 KiB in 1 files", "cached"):
        assert text in plan.output
    result = run("cache", language_model_yaml, *CACHE)
    assert result.exit_code == 0, result.output
    for text in ("loading the model", "100 of 100 contexts", "tokens/s", "saved cached"):
        assert text in result.output
    assert "already complete" in run("cache", language_model_yaml, *CACHE).output
    assert "match their checksums" in run("cache", language_model_yaml, *CACHE, "--check").output
    trained = run("train", language_model_yaml, *CACHE, "--set", "n_eval_batches=0")
    assert trained.exit_code == 0, trained.output
    assert "reads the cache 1.7 times" in trained.output


def test_a_comparison_file_has_a_cache_too(language_model_comparison_yaml):
    result = run("cache", language_model_comparison_yaml, *CACHE, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "100 contexts" in result.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_within_a_batch_and_the_same_command_resumes(
    language_model_yaml, monkeypatch, number
):
    inner, calls = cached_run.write_cache, []

    def interrupted(*args):
        for done in inner(*args):
            if done == 8:
                os.kill(os.getpid(), number)
            calls.append(done)
            yield done

    monkeypatch.setattr(cached_run, "write_cache", interrupted)
    result = run("cache", language_model_yaml, *CACHE)
    assert result.exit_code == 128 + number
    assert "resume with the same command" in result.output
    assert calls == [4, 8]
    monkeypatch.setattr(cached_run, "write_cache", inner)
    result = run("cache", language_model_yaml, *CACHE)
    assert result.exit_code == 0, result.output


def test_damage_is_found(language_model_yaml, tmp_path):
    run("cache", language_model_yaml, *CACHE)
    file = next((tmp_path / "cached").glob("*.arrow"))
    content = bytearray(file.read_bytes())
    content[3000] ^= 1
    file.write_bytes(content)
    result = run("cache", language_model_yaml, *CACHE, "--check")
    assert result.exit_code == 1
    assert "does not match its checksum" in result.output
    assert is_complete(tmp_path / "cached")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), "activations.cache: missing, set it"),
        ((*CACHE, "--set", "model_name=/no/such"), "model_name is '/no/such'"),
        ((*CACHE, "--set", "dataset_path=/no/such"), "dataset_path"),
        ((*CACHE, "--set", "hook_name=model.layers.9"), "similar names: model.layers.1"),
        ((*CACHE, "--set", "sae.d_in=8"), "sae.d_in must be 16"),
    ],
)
def test_bad_input_is_one_line(language_model_yaml, settings, message):
    result = run("cache", language_model_yaml, *settings)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]


def test_synthetic_data_have_no_cache(synthetic_yaml):
    result = run("cache", synthetic_yaml)
    assert result.exit_code == 2
    assert "runner must be 'language_model'" in result.output


@pytest.mark.parametrize("content", ["[1]", '{"a": 1}', "{", '{"key": [], "contexts": 1}'])
@pytest.mark.parametrize("options", [(), ("--check",)])
def test_a_damaged_description_is_one_line(language_model_yaml, tmp_path, content, options):
    run("cache", language_model_yaml, *CACHE)
    (tmp_path / "cached/cache.json").write_text(content)
    result = run("cache", language_model_yaml, *CACHE, *options)
    assert result.exit_code == 2, result.output
    assert "activations.cache" in result.stderr
    assert "is damaged" in result.stderr


def test_what_evaluations_have_stored_may_be_beside_it(language_model_yaml, tmp_path):
    (tmp_path / "cached/first-letters").mkdir(parents=True)
    result = run("cache", language_model_yaml, *CACHE)
    assert result.exit_code == 0, result.output


def test_a_folder_that_cannot_be_made_and_other_tokens(language_model_yaml, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("cache", language_model_yaml, "--set", "activations.cache=file/cached")
    assert result.exit_code == 2, result.output
    assert "activations.cache file/cached cannot be written" in result.stderr
    run("cache", language_model_yaml, *CACHE)
    result = run("cache", language_model_yaml, *CACHE, "--set", "activations.tokens=64")
    assert result.exit_code == 2, result.output
    assert "was begun with another number of tokens" in result.stderr


def test_a_dry_run_looks_model_and_dataset_up(language_model_yaml):
    for wrong in ("model_name=./nothing", "hook_name=model.layers.9", "dataset_path=./nothing"):
        result = run("cache", language_model_yaml, *CACHE, "--dry-run", "--set", wrong)
        assert result.exit_code == 2, result.output
        assert wrong.split("=")[0] in result.stderr


def test_a_complete_cache_may_be_read_only(language_model_yaml, monkeypatch):
    run("cache", language_model_yaml, *CACHE)
    monkeypatch.setattr(cache_writer, "check_writable", None)  # fails if it is called
    result = run("cache", language_model_yaml, *CACHE)
    assert result.exit_code == 0, result.output
    assert "cached is already complete" in result.output
