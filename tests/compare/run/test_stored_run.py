import pytest
import torch
from sae_lens import TrainingSAE
from safetensors.torch import save_file

from sae_lens_atm.compare import load_comparison
from sae_lens_atm.compare.run.stored_run import (
    FIGURES,
    MEASURED,
    TRAINING,
    has_decoder,
    has_sae,
    is_evaluated,
    is_trained,
    load_decoder,
)
from sae_lens_atm.files import write_json


@pytest.fixture
def planned(comparison_yaml):
    return load_comparison(comparison_yaml).planned[0]


@pytest.fixture
def home(planned, tmp_path):
    folder = tmp_path / planned.folder
    folder.mkdir(parents=True)
    return folder


def test_a_run_is_trained_when_its_training_file_and_its_sae_are_there(planned, home, tmp_path):
    assert not is_trained(planned, tmp_path)
    write_json(home / TRAINING, {})
    assert not is_trained(planned, tmp_path)
    (home / "sae").mkdir()
    write_json(home / "sae/cfg.json", {})
    assert is_trained(planned, tmp_path)


def test_an_evaluated_run_does_not_need_its_sae(planned, home, tmp_path):
    write_json(home / TRAINING, {})
    write_json(home / FIGURES, {"evaluation_key": planned.evaluation_key})
    assert is_trained(planned, tmp_path)
    assert not has_sae(planned, tmp_path)


def test_a_run_is_evaluated_if_the_key_is_that_of_the_plan(planned, home, tmp_path):
    assert not is_evaluated(planned, tmp_path, with_map=False)
    write_json(home / FIGURES, {"evaluation_key": "of other settings"})
    assert not is_evaluated(planned, tmp_path, with_map=False)
    write_json(home / FIGURES, {"evaluation_key": planned.evaluation_key})
    assert is_evaluated(planned, tmp_path, with_map=False)
    assert not is_evaluated(planned, tmp_path, with_map=True)
    write_json(home / FIGURES, {"evaluation_key": planned.evaluation_key, "cosine_map": "iVBORw"})
    assert is_evaluated(planned, tmp_path, with_map=True)


def test_a_decoder_comes_with_the_latents_that_fired(planned, home, tmp_path):
    sae = TrainingSAE.from_dict({"architecture": "topk", "d_in": 4, "d_sae": 6, "k": 2})
    sae.save_inference_model(home / "sae")
    alive = torch.tensor([True, False] * 3)
    assert not has_decoder(planned, tmp_path)
    save_file({"alive": alive}, home / MEASURED)
    assert has_decoder(planned, tmp_path)
    decoder, fired = load_decoder(planned, tmp_path)
    assert decoder.shape == (6, 4)
    assert not decoder.requires_grad
    assert torch.equal(fired, alive)
