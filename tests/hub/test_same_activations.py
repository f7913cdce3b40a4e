import shutil

import pytest
import torch

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.hub.same_activations import check_sae
from sae_lens_atm.training.run_file import load_run
from tests.explore.sample import linear_sae


@pytest.fixture
def sae(language_model_yaml):
    cfg = load_run(language_model_yaml).runner
    sae = linear_sae(torch.eye(16))
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = cfg.model_name, cfg.hook_name
    return sae


def test_the_sae_of_the_run_is_accepted(sae, language_model_yaml, gemma_folder, tmp_path):
    run = load_run(language_model_yaml)
    check_sae("it", sae, run)
    shutil.copytree(gemma_folder, tmp_path / "moved")  # the same files elsewhere
    sae.cfg.metadata.model_name = str(tmp_path / "moved")
    check_sae("it", sae, run)
    sae.cfg.metadata.model_name = sae.cfg.metadata.hook_name = None  # nothing is known
    check_sae("it", sae, run)


@pytest.mark.parametrize(
    ("field", "value"), [("hook_name", "model.layers.0"), ("model_name", "gpt2")]
)
def test_an_sae_of_other_activations_is_refused(sae, language_model_yaml, field, value):
    setattr(sae.cfg.metadata, field, value)
    with pytest.raises(SettingsError, match=f"{field} of it must be .*, got {value}"):
        check_sae("it", sae, load_run(language_model_yaml))


def test_short_names_of_a_model_are_accepted(sae, language_model_yaml):
    run = load_run(language_model_yaml)
    run.runner.model_name, sae.cfg.metadata.model_name = "gpt2-small", "openai-community/gpt2"
    check_sae("it", sae, run)


def test_another_width_is_refused(language_model_yaml):
    with pytest.raises(SettingsError, match="d_in of it must be 16"):
        check_sae("it", linear_sae(torch.eye(8)), load_run(language_model_yaml))


def test_an_sae_of_a_language_model_needs_its_file(sae, synthetic_yaml):
    with pytest.raises(SettingsError, match="the file has synthetic data"):
        check_sae("it", sae, load_run(synthetic_yaml))
