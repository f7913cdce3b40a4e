from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.hub.model_card import Described, card_metadata, section, updated_card
from tests.helpers import make_sae


@pytest.fixture
def described():
    sae = make_sae()
    sae.cfg.metadata.training_architecture = "atm"
    sae.cfg.metadata.training_architecture_details = {**sae.cfg.to_dict()}
    sae.cfg.metadata.model_name = "google/gemma-2-2b"
    return Described(sae, {"lr": 3e-4, "seed": 0}, {}, "measured:", Path("saved"))


def text_of(described):
    return section(described, "me/saes", "main", "a")


def head_of(card):
    return yaml.safe_load(card.split("---")[1])


def test_settings_of_atm_are_listed(described):
    text = text_of(described)
    for row in ("| activation | batchtopk |", "| masked_weight | 0.5 |", "| k | 3 |"):
        assert row in text
    assert "budget_end" not in text  # it has no effect without budget_weight
    assert "schedule |" not in text  # an option that was removed


def test_other_architectures_have_no_section_on_atm(described):
    described.sae.cfg.metadata.training_architecture = "batchtopk"
    assert "Adaptive Temporal Masking" not in text_of(described)
    assert "arxiv:2510.08855" not in card_metadata(described)["tags"]


def test_relu_has_no_k(described):
    described.sae.cfg.metadata.training_architecture_details["activation"] = "relu"
    assert "| k |" not in text_of(described)


def test_figures_are_in_order_and_finite(described):
    figures = {"my_figure": 2, "mcc": 0.123456, "l0": 3.0, "mse": float("nan"), "name": "x"}
    text = text_of(replace(described, figures=figures))
    rows = [line for line in text.splitlines() if line.endswith((" - |", " more |", " less |"))]
    assert rows == ["| L0 | 3 | - |", "| MCC | 0.1235 | more |", "| my figure | 2 | - |"]
    assert "**Figures**" not in text_of(described)


def test_the_window_of_dead_latents_is_named(described):
    described.sae.cfg.metadata.num_dead_features = 7
    assert "| dead latents, end of training | 7 |" in text_of(described)
    text = text_of(replace(described, runner={"dead_feature_window": 1000}))
    assert "| dead latents, last 1,000 steps of training | 7 |" in text


def test_a_branch_is_loaded_from_a_snapshot(described):
    text = section(described, "me/saes", "new", "a")
    assert 'snapshot_download("me/saes", revision="new"' in text
    assert "inspect" not in text


def test_synthetic_data_are_described(described):
    model = {"num_features": 10, "hidden_dim": 4}
    text = text_of(replace(described, runner={"synthetic_model": model}))
    assert "| data | a synthetic model of 10 features in 4 dimensions |" in text
    text = text_of(replace(described, runner={"synthetic_model": "me/model"}))
    assert "| data | synthetic model me/model |" in text


def test_metadata_is_added_to_that_of_the_card(described):
    old = "---\ntags: mine\nlicense: mit\n---\nText\n"
    head = head_of(updated_card(old, "a", "section", card_metadata(described)))
    assert head["license"] == "mit"
    assert head["base_model"] == ["google/gemma-2-2b"]
    assert head["tags"][0] == "mine"
    assert "saelens" in head["tags"]


def test_a_section_replaces_its_former_one_alone():
    card = updated_card(None, "a", "first", {})
    card = updated_card(card, "b", "second", {})
    card = updated_card(card, "a", r"new \1", {})
    assert r"new \1" in card
    assert "second" in card
    assert "first" not in card


def test_metadata_that_is_no_mapping_is_refused():
    with pytest.raises(SettingsError, match=r"^README\.md"):
        updated_card("---\na: [\n---\nText\n", "a", "x", {})


def test_a_folder_above_the_sae_is_no_id_on_the_hub(described, tmp_path):
    (tmp_path / "other/google/gemma-2-2b").mkdir(parents=True)
    near = replace(described, folder=tmp_path / "other/runs/sae")
    assert "base_model" not in card_metadata(near)
    assert "base_model" in card_metadata(described)
