from pathlib import Path

import pytest
import torch

from sae_lens_atm.method.masking import mask_probability
from sae_lens_atm.training.latent_history import (
    LATENTS_FILENAME,
    curve_points,
    read_latent_history,
)
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from tests.training.runs import stopped_after

SETTINGS = ["run_final_eval=false"]


def test_points_end_with_the_last_step():
    assert curve_points(100, 4) == [25, 50, 75, 100]
    assert curve_points(3, 20) == [1, 2, 3]


def test_each_point_holds_importance_and_mask_probability(synthetic_yaml):
    masks = {}

    def on_step(trainer, _output):
        masks[trainer.n_training_steps + 1] = trainer.sae.draw_mask()

    run = load_run(synthetic_yaml, [*SETTINGS, "sae.mask_warm_up_steps=10"])
    train(run, on_step=on_step)
    recorded = read_latent_history(Path("out"))
    assert recorded is not None
    assert recorded["steps"].tolist() == list(range(1, 41))
    for row, step in enumerate(recorded["steps"].tolist()):
        mask = masks[step]
        assert recorded["importance"][row].tolist() == mask.importance.tolist()
        assert float(recorded["threshold"][row]) == float(mask.threshold)
        probability = recorded["mask_probability"][row].float()
        torch.testing.assert_close(probability, mask.probability, rtol=1e-3, atol=1e-3)
    assert not recorded["mask_probability"][8].any()  # the mask of step 10 is the last without
    rate = run.runner.sae.mask_rate
    expected = mask_probability(recorded["importance"][20], recorded["threshold"][20], rate)
    torch.testing.assert_close(
        recorded["mask_probability"][20].float(), expected, atol=1e-3, rtol=0
    )


def test_a_run_that_was_stopped_has_the_history_of_one_that_was_not(synthetic_yaml):
    train(load_run(synthetic_yaml, SETTINGS))
    whole = read_latent_history(Path("out"))
    run = load_run(synthetic_yaml, [*SETTINGS, "output_path=again"])
    checkpoint = stopped_after(17, run)
    assert read_latent_history(Path("again")) is None
    part = read_latent_history(checkpoint)
    assert part is not None
    assert part["steps"].tolist() == list(range(1, 18))
    train(run, resume="again")
    resumed = read_latent_history(Path("again"))
    assert whole is not None
    assert resumed is not None
    assert {name: t.tolist() for name, t in resumed.items()} == {
        name: t.tolist() for name, t in whole.items()
    }


def test_saes_without_importance_have_no_file(synthetic_yaml):
    Path("out").mkdir()
    (Path("out") / LATENTS_FILENAME).touch()  # of an earlier run in this folder
    fields = ["architecture: topk", "d_in: 16", "d_sae: 32", "k: 2"]
    train(load_run(synthetic_yaml, [*SETTINGS, f"sae={{{', '.join(fields)}}}"]))
    assert not (Path("out") / LATENTS_FILENAME).exists()


@pytest.mark.parametrize("content", [b"", b"no tensors"])
def test_a_damaged_file_counts_as_none(tmp_path, content):
    (tmp_path / LATENTS_FILENAME).write_bytes(content)
    assert read_latent_history(tmp_path) is None
    assert read_latent_history(tmp_path / "missing") is None


def test_a_run_is_worth_more_than_its_history(synthetic_yaml, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sae_lens_atm.training.latent_history.save_file", full)
    with pytest.warns(UserWarning, match="cannot save out: No space left"):
        train(load_run(synthetic_yaml, SETTINGS))
    assert (Path("out") / "cfg.json").exists()
