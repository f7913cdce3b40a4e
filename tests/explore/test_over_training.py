import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae_lens_atm.explore.over_training import over_training
from sae_lens_atm.training.latent_history import LATENTS_FILENAME
from sae_lens_atm.training.run import train
from sae_lens_atm.training.run_file import load_run
from tests.explore.sample import family, write_sample
from tests.explore.test_content import data_of
from tests.training.runs import stopped_after


def write(folder, importance, probability):
    steps = len(importance)
    folder.mkdir(exist_ok=True)
    tensors = {
        "steps": torch.arange(1, steps + 1),
        "importance": importance,
        "mask_probability": probability.half(),
        "threshold": torch.ones(steps),
    }
    save_file(tensors, folder / LATENTS_FILENAME)


def test_figures_in_levels(tmp_path):
    # Two steps of three latents. Levels of the logarithm run from -4 (level 1) to 3 (level 255).
    importance = torch.tensor([[0.0, 1e-4, 1e3], [1e-9, 1.0, 1e9]])
    probability = torch.tensor([[0.0, 1.0, 0.5], [0.2, 0.0, 0.0]])
    write(tmp_path / "run", importance, probability)
    found = over_training(str(tmp_path / "run"))
    assert found is not None
    assert found.steps.tolist() == [1, 2]
    middle = round(1 + 4 / 7 * 254)
    assert found.importance.tolist() == [[0, 1], [1, middle], [255, 255]]
    assert found.masked.tolist() == [[0, 51], [255, 0], [128, 0]]
    level = int(found.importance[1, 1])
    assert 10 ** (-4 + 7 * (level - 1) / 254) == pytest.approx(1.0, rel=0.04)


def test_the_folder_of_an_sae_in_a_comparison(tmp_path):
    write(tmp_path / "run", torch.ones(2, 3), torch.zeros(2, 3))
    (tmp_path / "run/sae").mkdir()
    assert over_training(str(tmp_path / "run/sae")) is not None
    assert over_training("somebody/saes:layer-3") is None
    assert over_training(str(tmp_path)) is None


def test_a_run_that_was_stopped_has_its_record_in_the_checkpoint(synthetic_yaml):
    run = load_run(synthetic_yaml, ["run_final_eval=false"])
    checkpoint = stopped_after(17, run)
    for folder in ("out", str(checkpoint)):
        found = over_training(folder)
        assert found is not None
        assert found.steps.tolist() == list(range(1, 18))
    train(run, resume="out")
    found = over_training("out")
    assert found is not None
    assert found.steps.tolist() == list(range(1, 41))
    assert found.importance.shape == (32, 40)


def test_a_record_of_another_width_is_left_out(tmp_path):
    reading = family()
    for width, is_shown in ((12, True), (11, False)):
        write(tmp_path / "run", torch.ones(2, width), torch.zeros(2, width))
        record = over_training(str(tmp_path / "run"))
        _, data = data_of(write_sample(tmp_path / "page.html", reading, over_training=record))
        shown = data["saes"][0]["over_training"]
        assert (shown is not None) == is_shown
        if is_shown:
            assert np.asarray(shown["steps"]).tolist() == [1, 2]
