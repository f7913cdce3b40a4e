import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

from sae_lens_atm.data.activation_cache import ActivationCache
from sae_lens_atm.errors import CheckpointError, SettingsError
from sae_lens_atm.training import cached_run
from sae_lens_atm.training.cached_run import cache_activations, held_out_tokens, open_cache
from sae_lens_atm.training.preflight.checks import check_run
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from tests.conftest import CONTEXT
from tests.training.processes import run_on
from tests.training.runs import resumes_bit_for_bit, stopped_after

CACHE = "activations={cache: cached, tokens: 1600, dtype: float32}"


@pytest.fixture
def path(language_model_yaml):
    cache_activations(load_run(language_model_yaml, [CACHE]), lambda _done, _all: None)
    return language_model_yaml


def cached(path, *overrides):
    return load_run(path, [CACHE, *overrides])


def test_a_run_without_the_model(path, monkeypatch):
    def not_loaded(_cfg):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(cached_run, "load_language_model", not_loaded)
    result = train(cached(path, "n_eval_batches=0", "lr=1e-2", "training_tokens=6400"))
    assert result.sae.tracker.steps.item() == 100
    assert result.figures == {}
    saved = SAE.load_from_disk("out")
    assert saved.cfg.metadata.hook_name == "model.layers.1"
    assert saved.cfg.metadata.context_size == CONTEXT
    stored = json.loads(Path("out/runner_cfg.json").read_text())
    assert stored["training_tokens"] == 6400
    run = cached(path)
    cache = open_cache(run)
    x = cache.read(cache.rows(0))
    error = (saved(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert error < 0.5  # it learned something, in the units of the model


def test_no_run_trains_on_the_tokens_of_the_evaluation(path, monkeypatch):
    read = []
    inner = ActivationCache.read

    def listen(self, rows):
        read.extend(rows.tolist())
        return inner(self, rows)

    monkeypatch.setattr(ActivationCache, "read", listen)
    result = train(cached(path))
    assert {"explained_variance", "l0", "ce_loss_score"} <= result.figures.keys()
    assert set(read) == set(range(4 * CONTEXT, 1600))


@pytest.mark.parametrize(("window", "size", "read"), [(50_000, 2048, None), (30, 8, 30)])
def test_dead_latents_are_counted_on_other_stored_tokens(path, monkeypatch, window, size, read):
    monkeypatch.setattr(cached_run, "_DEAD_WINDOW", window)
    monkeypatch.setattr(cached_run, "TOKENS", size)
    run = cached(path)
    cache = open_cache(run)
    stored = held_out_tokens(cache, run).stored_inputs
    expected = cache.read(cache.rows(4)[:read])
    for _ in range(2):
        assert torch.equal(torch.cat(list(stored)), expected)
    figures = train(run).figures
    assert figures["dead_window"] == 4 * CONTEXT + len(expected)


@pytest.mark.parametrize("scale", ["none", "expected_average_only_in"])
def test_resumed_equals_straight_bit_for_bit(path, scale):
    settings = [f"sae.normalize_activations={scale}", "n_batches_for_norm_estimate=3"]
    settings += ["n_eval_batches=0", "prefetch_llm_batches=2"]
    resumes_bit_for_bit(lambda output: cached(path, *settings, f"output_path={output}"))


def test_a_run_with_the_model_does_not_resume_from_a_cached_one(path):
    stopped_after(5, cached(path, "n_eval_batches=0"))
    with pytest.raises((CheckpointError, SettingsError), match="cached"):
        train(load_run(path), resume="out")


def test_a_cached_run_does_not_resume_from_one_with_the_model(path):
    stopped_after(5, load_run(path))
    with pytest.raises(CheckpointError, match="did not read cached activations"):
        train(cached(path), resume="out")


def test_the_cache_is_checked_before_training(path, language_model_yaml):
    with pytest.raises(SettingsError, match="another hook_name"):
        check_run(cached(path, "hook_name=model.layers.0"))
    elsewhere = load_run(language_model_yaml, ["activations.cache=elsewhere"])
    with pytest.raises(SettingsError, match="run `sae-lens-atm cache`"):
        check_run(elsewhere)
    with pytest.raises(SettingsError, match="use_cached_activations"):
        check_run(cached(path, "use_cached_activations=true"))


def weights_of_rank(path):
    result = train(load_run(path, [CACHE, "n_eval_batches=0"]))
    return result.sae.state_dict()


def test_two_processes_are_one(path):
    one = train(cached(path, "n_eval_batches=0", "output_path=one")).sae.state_dict()
    for state in run_on(2, weights_of_rank, path).values():
        for name, tensor in one.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)
