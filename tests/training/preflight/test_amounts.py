import math

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig
from sae_lens.training.mixing_buffer import mixing_buffer

from sae_lens_atm import ATMTrainingSAEConfig
from sae_lens_atm.training.preflight import amounts
from sae_lens_atm.training.preflight.amounts import (
    checkpoints_left,
    estimation_batches,
    evaluations_in_training,
    llm_batches,
    llm_batches_of,
    schedule_parts,
)
from sae_lens_atm.training.run_file import load_run


def atm(**fields):
    return ATMTrainingSAEConfig(d_in=4, d_sae=8, k=2, schedule_steps=1000, **fields)


def test_parts_of_the_schedule():
    # masks from 100 to 600, pressure on children from 200 on
    cfg = atm(mask_warm_up_steps=100, mask_end=0.6, parent_start=0.2)
    assert schedule_parts(cfg, 0, 1000) == [(0, 100), (100, 100), (200, 400), (600, 400)]
    assert schedule_parts(cfg, 250, 1000) == [(250, 350), (600, 400)]
    assert schedule_parts(cfg, 0, 150) == [(0, 100), (100, 50)]
    off = {"mask_rate": 0, "parent_weight": 0}
    without = atm(**off)
    assert schedule_parts(without, 0, 1000) == [(0, 1000)]
    penalty = atm(**off, frequency_penalty=0.5, frequency_penalty_end=0.3)
    assert schedule_parts(penalty, 0, 1000) == [(0, 300), (300, 700)]
    endless = atm(**off, frequency_penalty=0.5, frequency_penalty_end=1.0)
    assert schedule_parts(endless, 0, 1000) == [(0, 1000)]
    budgets = atm(**off, budget_weight=0.5, budget_end=0.3)
    assert schedule_parts(budgets, 0, 1000) == [(0, 300), (300, 700)]
    assert schedule_parts(atm(**off, per_sample_end=0.2), 0, 1000) == [(0, 200), (200, 800)]
    other = BatchTopKTrainingSAEConfig(d_in=4, d_sae=8, k=2)
    assert schedule_parts(other, 10, 1000) == [(10, 990)]


@pytest.mark.parametrize("mixing", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("buffer", "batch", "llm_batch"), [(64, 16, 8), (64, 16, 48), (40, 24, 7)])
def test_model_batches_are_those_that_saelens_computes(mixing, buffer, batch, llm_batch):
    computed = 0

    def activations():
        nonlocal computed
        while True:
            computed += 1
            yield torch.zeros(llm_batch, 1)

    batches = mixing_buffer(buffer, batch, activations(), mixing)
    for number in range(1, 30):
        next(batches)
        assert llm_batches(number * batch, buffer, batch, llm_batch, mixing) == computed


def test_model_batches_in_closed_form():
    # Without a buffer to fill, one batch of the model serves one training batch.
    assert llm_batches(1000 * 64, 64, 64, 64, 0.0) == 1000
    # 8 batches fill the buffer, and half of it is refilled for each further half.
    assert llm_batches(10 * 256, 512, 64, 64, 0.5) == 8 + 9 * 4
    assert llm_batches(0, 512, 64, 64, 0.5) == 0


@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_batches_of_a_very_long_run(mixing, monkeypatch):
    found = llm_batches(2**53, 512, 64, 48, mixing)  # at once
    assert found == pytest.approx(2**53 / 48, rel=1e-4)
    exact = llm_batches(90_000, 512, 64, 48, mixing)
    monkeypatch.setattr(amounts, "_COUNTED", 100)
    assert llm_batches(90_000, 512, 64, 48, mixing) == pytest.approx(exact, abs=512 / 48)


def test_excluded_tokens_take_more_model_batches(language_model_yaml):
    cfg = load_run(language_model_yaml, ["activations_mixing_fraction=0"]).runner
    # 4 prompts of 16 tokens are one batch of 64
    assert llm_batches_of(cfg, 2560) == 40
    assert llm_batches_of(cfg, 2560, 15 / 16) == pytest.approx(40 * 16 / 15, abs=1)


def test_batches_of_the_estimate(language_model_yaml, synthetic_yaml):
    scaled = ["sae.normalize_activations=expected_average_only_in"]
    assert estimation_batches(load_run(language_model_yaml)) == 0
    assert estimation_batches(load_run(language_model_yaml, scaled)) == 1000
    assert estimation_batches(load_run(synthetic_yaml, scaled)) == 1000
    white = ["sae.normalize_activations=covariance_whitening", "n_batches_for_norm_estimate=3"]
    assert estimation_batches(load_run(synthetic_yaml, white)) == 3


def test_evaluations_in_training(language_model_yaml, synthetic_yaml):
    logged = [
        "logger.log_to_wandb=true",
        "logger.wandb_log_frequency=2",
        "logger.eval_every_n_wandb_logs=3",
    ]
    assert evaluations_in_training(load_run(language_model_yaml)) == 0
    assert evaluations_in_training(load_run(language_model_yaml, logged)) == 40 // 6
    assert evaluations_in_training(load_run(language_model_yaml, logged), 20) == 6 - 3
    assert evaluations_in_training(load_run(synthetic_yaml, logged)) == 0
    assert evaluations_in_training(load_run(synthetic_yaml, [*logged, "eval_frequency=1"])) == 6


def test_checkpoints_left(synthetic_yaml):
    run = load_run(synthetic_yaml, ["n_checkpoints=4", "save_final_checkpoint=true"])
    assert checkpoints_left(run) == 5
    assert checkpoints_left(run, 20) == 3
    assert math.isclose(checkpoints_left(load_run(synthetic_yaml)), 0)
