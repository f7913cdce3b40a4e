import json
from pathlib import Path

import pytest
import torch
import wandb
from sae_lens import SAE

from sae_lens_atm.sae.forward_pass import mean_l0
from sae_lens_atm.training import history
from sae_lens_atm.training.history import HISTORY_FILENAME, LastBatch
from sae_lens_atm.training.preflight.checks import check_run
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from tests.training.runs import stopped_after, synthetic_run

SETTINGS = ["run_final_eval=false"]


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / HISTORY_FILENAME).open()]


def test_each_step_has_a_row_of_its_figures(synthetic_yaml):
    logged = []

    def on_step(trainer, output):
        samples = trainer.n_training_samples
        logged.append(trainer.build_train_step_log_dict(output, samples))
        assert len(rows("out")) == len(logged)  # written while training

    train(load_run(synthetic_yaml, SETTINGS), on_step=on_step)
    recorded = rows("out")
    assert [row["step"] for row in recorded] == list(range(1, 41))
    names = {
        "loss": "losses/overall_loss",
        "l0": "metrics/l0",
        "explained_variance": "metrics/explained_variance",
        "dead_latents": "sparsity/dead_features",
        "masked_fraction": "metrics/masked_fraction",
        "samples": "details/n_training_samples",
    }
    for row, expected in zip(recorded, logged, strict=True):
        for name, key in names.items():
            assert row[name] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), name
    assert max(row["masked_fraction"] for row in recorded) > 0


def test_wandb_gets_the_figures_under_the_same_names(monkeypatch, synthetic_yaml):
    logged = []
    original = wandb.Run.log

    def log(run, data, step=None, **options):
        if "loss" in data:
            logged.append((step, data))
        original(run, data, step=step, **options)

    monkeypatch.setattr(wandb.Run, "log", log)  # `wandb.log` is a method of the run
    train(load_run(synthetic_yaml, [*SETTINGS, "logger.log_to_wandb=true"]))
    figures = {"loss", "l0", "explained_variance", "dead_latents", "masked_fraction"}
    for (step, content), row in zip(logged, rows("out"), strict=True):
        assert step == row["step"] - 1  # SAELens counts from 0
        assert content == {name: pytest.approx(row[name]) for name in figures}


def test_long_runs_skip_steps_and_other_architectures_have_no_masks(monkeypatch, synthetic_yaml):
    monkeypatch.setattr(history, "ROWS", 7)
    atm = "architecture: atm, d_in: 16, d_sae: 32, k: 2, schedule_steps: 40, mask_warm_up_steps: 5"
    other = "architecture: standard, d_in: 16, d_sae: 32"
    synthetic_yaml.write_text(synthetic_yaml.read_text().replace(atm, other))
    train(load_run(synthetic_yaml, SETTINGS))
    assert [row["step"] for row in rows("out")] == [6, 12, 18, 24, 30, 36]
    assert "masked_fraction" not in rows("out")[0]


def test_the_history_of_a_resumed_run_is_the_one_without_stops():
    train(synthetic_run("straight", n_checkpoints=2))
    stopped_after(17, synthetic_run("stopped", n_checkpoints=2))
    with Path("stopped", HISTORY_FILENAME).open("a") as file:
        file.write('{"step": 18, "loss": 3}\n{"ste')  # as after kill -9
    train(synthetic_run("stopped", n_checkpoints=2), resume="stopped")
    train(synthetic_run("elsewhere"), resume="straight/checkpoints/896")
    assert rows("straight") == rows("stopped") == rows("elsewhere")


def test_the_l0_of_the_saved_sae_is_measured(synthetic_yaml):
    batches = []
    run = load_run(synthetic_yaml, [*SETTINGS, "training_samples=320"])
    with pytest.warns(UserWarning, match="L0 of the saved SAE is .* have not settled"):
        result = train(run, on_step=lambda _, output: batches.append(output.sae_in))
    saved = SAE.load_from_disk("out")
    assert result.saved_l0 == float(mean_l0(saved.encode(batches[-1])))
    assert result.training_l0 == 2
    assert abs(result.saved_l0 - 2) > 0.1


def test_without_a_step_there_is_no_l0_to_compare(tmp_path):
    assert torch.tensor(LastBatch().saved_l0(tmp_path, "cpu")).isnan()


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        (["sae.mask_warm_up_steps=40", "sae.mask_end=1"], "ends after 40 steps"),
        (["sae.mask_warm_up_steps=24"], "mask_end ends it at step 24"),
        (["sae.mask_warm_up_steps=40", "sae.mask_rate=0"], None),
        (["sae.mask_warm_up_steps=40", "sae.mask_end=0"], None),
        (["sae.mask_warm_up_steps=23"], None),
    ],
)
def test_a_run_that_never_masks_is_announced(synthetic_yaml, recwarn, settings, warns):
    check_run(load_run(synthetic_yaml, settings))
    messages = [str(w.message) for w in recwarn if "will be masked" in str(w.message)]
    assert len(messages) == (warns is not None)
    assert all(warns in message for message in messages)
