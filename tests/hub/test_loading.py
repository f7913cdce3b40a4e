import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_lens_atm.errors import HubError, SettingsError
from sae_lens_atm.hub import loading
from sae_lens_atm.hub.loading import load_sae
from tests.helpers import make_sae, train


@pytest.fixture
def folder(tmp_path):
    train(make_sae(), 3).save_model(tmp_path / "sae")
    return tmp_path / "sae"


def test_a_folder_is_loaded(folder):
    assert load_sae(str(folder)).cfg.architecture() == "atm"


@pytest.mark.parametrize("reference", ["nowhere", "nowhere:", "."])
def test_what_is_no_sae_is_named(reference):
    with pytest.raises(SettingsError, match=f"(no folder )?{reference}"):
        load_sae(reference)


def test_the_hub_gets_repo_and_id(monkeypatch):
    monkeypatch.setattr(
        loading.SAE, "from_pretrained", lambda *names: torch.nn.Linear(*map(len, names))
    )
    loaded = load_sae("me/saes:layer/a:b")
    assert (loaded.in_features, loaded.out_features) == (len("me/saes"), len("layer/a:b"))


def test_an_error_of_the_hub_is_one(monkeypatch):
    def unreachable(*_):
        raise OSError("no\nconnection")

    monkeypatch.setattr(loading.SAE, "from_pretrained", unreachable)
    with pytest.raises(HubError, match=r"^me/saes:a: no connection"):
        load_sae("me/saes:a")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(folder, value):
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path)
    tensors["W_dec"][0, 0] = value
    save_file(tensors, path)
    with pytest.raises(SettingsError, match="W_dec holds NaN or Inf"):
        load_sae(str(folder))


@pytest.mark.parametrize("architecture", ["nobody", None, ["atm"]])
def test_an_architecture_that_is_not_registered(folder, architecture):
    path = folder / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architecture": architecture}))
    with pytest.raises(SettingsError, match=r"architecture in cfg.json must be one of .*atm") as e:
        load_sae(str(folder))
    assert str(e.value).endswith(f", got {architecture!r}")


def test_a_damaged_file_is_named_with_the_error(folder):
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(SettingsError, match=r"^cannot load .*: SafetensorError"):
        load_sae(str(folder))


@pytest.mark.parametrize("inside", ["sae", "runs/atm-l0-4/sae"])
def test_the_folder_of_a_comparison_leads_to_its_sae(tmp_path, inside):
    train(make_sae(), 1).save_model(tmp_path / "out" / inside)
    with pytest.raises(SettingsError, match=f"did you mean {tmp_path / 'out' / inside}[?]$"):
        load_sae(str(tmp_path / "out"))
