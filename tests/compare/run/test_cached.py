"""Comparisons on cached activations of a language model."""

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file

from sae_lens_atm.compare import load_comparison, planned_jobs, summarise
from sae_lens_atm.compare.run import cached
from sae_lens_atm.compare.run.cached import CachedData
from sae_lens_atm.compare.run.checks import check
from sae_lens_atm.compare.run.training import train_one
from sae_lens_atm.errors import Interrupted, SettingsError
from sae_lens_atm.training.cached_run import open_cache
from sae_lens_atm.training.hooks import StopFlag
from tests.conftest import CONTEXT
from tests.helpers import state_equal

CACHE = "activations={cache: cached, tokens: 1600, dtype: float32}"


def load(path, *overrides):
    return load_comparison(path, [CACHE, *overrides])


def run_here(comparison):
    """Run all jobs in this process."""
    for job in planned_jobs(comparison):
        job.work(lambda _steps: None, StopFlag())
    return summarise(comparison, {})


def test_one_pass_of_the_model_for_all_runs(language_model_comparison_yaml, monkeypatch):
    loads, inner = [], cached.load_language_model
    monkeypatch.setattr(cached, "load_language_model", lambda cfg: loads.append(1) or inner(cfg))
    comparison = load(language_model_comparison_yaml)
    labels = [job.label for job in planned_jobs(comparison)]
    assert labels[0] == "cache"
    assert labels[1:5] == [f"{n}, L0 4, seed 0" for n in ("atm", "batchtopk", "gated", "untrained")]
    assert labels[5] == "evaluate L0 4, seed 0"
    assert len(labels) == 1 + 2 * 5
    results = run_here(comparison)
    assert len(results.runs) == 8
    assert len(loads) == 2  # once for the SAEs of each seed
    for run in results.runs:
        assert {"explained_variance", "ce_loss_score", "l0"} <= run.figures.keys()
    atm = next(run for run in results.runs if run.entry == "atm")
    assert atm.curve is not None
    assert atm.importance is not None
    metadata = SAE.load_from_disk(comparison.output / atm.folder / "sae").cfg.metadata
    assert metadata.hook_name == "model.layers.1"
    assert metadata.context_size == CONTEXT
    assert planned_jobs(comparison) == []


def test_a_complete_cache_is_used(language_model_comparison_yaml):
    comparison = load(language_model_comparison_yaml, "seeds=[0]")
    run_here(comparison)
    more = load(language_model_comparison_yaml, "seeds=[0, 1]")
    assert planned_jobs(more)[0].label == "atm, L0 4, seed 1"


def test_all_runs_of_a_seed_read_the_same_batches_and_none_of_the_evaluation(
    language_model_comparison_yaml,
):
    comparison = load(language_model_comparison_yaml)
    cached.make_cache(comparison.planned, lambda _done, _all: None)
    cache = open_cache(comparison.planned[0].run)
    first, second, other = (
        next(CachedData(p, cache).batches(0))
        for p in (comparison.planned[0], comparison.planned[1], comparison.planned[-1])
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    held_out = CachedData(comparison.planned[0], cache).held_out().x
    assert len(held_out) == 8 * CONTEXT  # two batches of four contexts
    assert torch.equal(held_out, cache.read(cache.rows(0, 8)))


@pytest.mark.parametrize("entry", ["atm", "gated"])
@pytest.mark.parametrize("scale", ["none", "expected_average_only_in"])
def test_a_stopped_run_resumes_exactly(language_model_comparison_yaml, entry, scale):
    settings = [f"sae.normalize_activations={scale}", "n_batches_for_norm_estimate=3"]
    settings += ["seeds=[0]"]

    def train(output, until=None):
        comparison = load(language_model_comparison_yaml, *settings, f"output_path={output}")
        planned = next(p for p in comparison.planned if p.entry == entry)
        cached_data = CachedData(planned, open_cache(planned.run))
        stop = StopFlag()

        def on_step(trainer, _):
            if trainer.n_training_steps + 1 == until:
                stop.request()

        train_one(planned, cached_data, comparison.output, 4, on_step, stop)
        return load_file(comparison.output / planned.folder / "sae" / "sae_weights.safetensors")

    cached.make_cache(load(language_model_comparison_yaml).planned, lambda _done, _all: None)
    straight = train("straight")
    with pytest.raises(Interrupted):
        train("stopped", until=11)
    assert state_equal(train("stopped"), straight)


def test_an_sae_whose_training_failed_leaves_the_evaluation_of_the_others(
    language_model_comparison_yaml,
):
    comparison = load(language_model_comparison_yaml, "seeds=[0]")
    jobs = {job.label: job for job in planned_jobs(comparison)}
    del jobs["batchtopk, L0 4, seed 0"]  # as if it had diverged
    for job in jobs.values():
        job.work(lambda _steps: None, StopFlag())
    evaluated = {run.entry for run in summarise(comparison, {}).runs}
    assert evaluated == {"atm", "gated", "untrained"}


def test_the_longest_run_sets_the_size_of_the_cache(language_model_comparison_yaml):
    comparison = load_comparison(
        language_model_comparison_yaml,
        ["activations={cache: cached}", "architectures.batchtopk.run.training_tokens=2560"],
    )
    assert cached.contexts_to_cache(comparison.planned) == 8 + 2560 // CONTEXT


def test_a_cache_of_another_hook_is_refused_before_training(language_model_comparison_yaml):
    comparison = load(language_model_comparison_yaml)
    cached.make_cache(comparison.planned, lambda _done, _all: None)
    with pytest.raises(SettingsError, match="another hook_name"):
        check(load(language_model_comparison_yaml, "hook_name=model.layers.0"))


def test_entries_share_the_cache(language_model_comparison_yaml):
    with pytest.raises(SettingsError, match=r"run\.activations cannot differ"):
        load(language_model_comparison_yaml, "architectures.atm.run.activations={cache: other}")
