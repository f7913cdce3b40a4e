import pytest
import torch

from sae_lens_atm.training.checkpoints import newest_checkpoint, samples_of
from sae_lens_atm.training.preflight import (
    estimate,
    language_model_time,
    timed_model,
    timing,
)
from sae_lens_atm.training.preflight.estimate import estimate_time
from sae_lens_atm.training.preflight.timing import AFTER, BEFORE, TRAINING
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run

LIMIT = 1.0
SCALED = ["sae.normalize_activations=expected_average_only_in", "n_batches_for_norm_estimate=7"]


def rows(entries):
    return [(entry.phase, entry.what) for entry in entries]


def test_a_synthetic_run(synthetic_yaml, tmp_path):
    named = []
    run = load_run(synthetic_yaml, [*SCALED, "n_checkpoints=2"])
    entries = estimate_time(run, limit=LIMIT, report=named.append)
    assert rows(entries) == [
        (BEFORE, "build the synthetic model"),
        (BEFORE, "estimate the activation scale: 7 batches of 64"),
        (TRAINING, "SAE: 40 steps, each with 64 samples"),
        (TRAINING, "draw 40 batches"),
        (TRAINING, "2 checkpoints"),
        (AFTER, "evaluation of 1,000 samples"),
    ]
    assert all(entry.seconds > 0 for entry in entries)
    by_name = dict(zip(rows(entries), entries, strict=True))
    drawn = by_name[TRAINING, "draw 40 batches"].seconds / 40
    assert entries[1].seconds == pytest.approx(7 * drawn)
    assert named[0] == "training steps of the SAE"
    assert not (tmp_path / "out").exists()


def test_a_run_that_resumes_does_the_rest(synthetic_yaml):
    train(load_run(synthetic_yaml, [*SCALED, "n_checkpoints=1"]))
    checkpoint = newest_checkpoint("out")
    entries = estimate_time(load_run(synthetic_yaml, SCALED), checkpoint, LIMIT)
    what = [entry.what for entry in entries]
    left = 40 - samples_of(checkpoint) // 64
    assert 0 < left < 40
    assert f"SAE: {left} steps, each with 64 samples" in what
    assert f"draw {left} batches" in what
    assert not any("estimate the activation scale" in text for text in what)


def test_a_run_on_a_language_model(language_model_yaml, tmp_path):
    more = [*SCALED, "n_eval_batches=3", "prefetch_llm_batches=2", "n_checkpoints=1"]
    entries = estimate_time(load_run(language_model_yaml, more), limit=LIMIT)
    assert [entry.phase for entry in entries] == [BEFORE] * 3 + [TRAINING] * 3 + [AFTER]
    what = [entry.what for entry in entries]
    assert what[0] == "load the language model and open the dataset"
    # Without mixing, a model batch of 4 x 16 tokens is a training batch.
    assert what[1].startswith("fill the buffer: 1 model batches of 4 x 16 tokens")
    assert what[2] == (
        "estimate the activation scale: 7 model batches at most, fewer when the standard error is "
        "below 0.1%"
    )
    assert "SAE: 40 steps, each with 64 tokens" in what
    assert any(text.startswith("language model: 39 model batches") for text in what)
    assert what[-1].startswith("evaluation: 3 batches of 4 x 16 tokens")
    assert all(entry.seconds > 0 for entry in entries)
    assert not (tmp_path / "out").exists()


def test_evaluations_for_wandb_are_counted(language_model_yaml, monkeypatch):
    monkeypatch.setattr(language_model_time, "time_work", lambda *_: timing.Timed(2.0, 1, 1))
    evaluation = timed_model.EvaluationTime(timing.Timed(3.0, 1, 1), 1.0)
    monkeypatch.setattr(timed_model.TimedModel, "time_evaluation", lambda *_: evaluation)
    more = ["logger.log_to_wandb=true", "logger.wandb_log_frequency=2"]
    more += ["logger.eval_every_n_wandb_logs=3"]
    entries = estimate_time(load_run(language_model_yaml, more), limit=LIMIT)
    (after,) = [entry for entry in entries if entry.phase == AFTER]
    (during,) = [entry for entry in entries if "6 evaluations" in entry.what]
    assert (after.seconds, during.seconds) == (3, 6 * 2)


def test_a_model_that_is_not_here_is_named(language_model_yaml):
    entries = estimate_time(load_run(language_model_yaml, ["model_name=a/b"]), limit=LIMIT)
    (missing,) = [entry for entry in entries if entry.seconds is None]
    assert missing.reason == "a/b is not on this machine"
    (steps,) = [entry for entry in entries if entry.what.startswith("SAE: ")]
    assert steps.seconds > 0


def test_a_dataset_that_cannot_be_read_is_named(language_model_yaml):
    entries = estimate_time(load_run(language_model_yaml, ["dataset_path=nowhere"]), limit=LIMIT)
    (missing,) = [entry for entry in entries if entry.seconds is None]
    assert "nowhere" in missing.reason


def test_a_model_that_does_not_fit_is_not_loaded(language_model_yaml, monkeypatch):
    monkeypatch.setattr(timed_model, "available_bytes", lambda _: 1000)
    monkeypatch.setattr(timed_model, "load_language_model", None)
    entries = estimate_time(load_run(language_model_yaml), limit=LIMIT)
    (missing,) = [entry for entry in entries if entry.seconds is None]
    assert "free" in missing.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_here_is_named(synthetic_yaml):
    (entry,) = estimate_time(load_run(synthetic_yaml, ["device=cuda"]))
    assert entry.seconds is None
    assert "no CUDA device" in entry.reason


def test_steps_that_do_not_fit_are_named(synthetic_yaml, monkeypatch):
    monkeypatch.setattr(timing, "available_bytes", lambda _: 1000)
    (entry,) = estimate_time(load_run(synthetic_yaml))
    assert (entry.what, entry.seconds) == ("everything", None)


def test_what_is_left_out_is_named(language_model_yaml, monkeypatch):
    monkeypatch.setattr(estimate, "number_of_processes", lambda: 2)
    entries = estimate_time(load_run(language_model_yaml, ["compile_sae=true"]), limit=LIMIT)
    missing = {entry.what for entry in entries if entry.seconds is None}
    assert missing == {"exchange between processes", "compilation"}
    assert any(entry.what.startswith("SAE: 40 steps, each with 32 tokens") for entry in entries)
