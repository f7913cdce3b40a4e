import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.preflight.checks import check_run
from sae_lens_atm.training.preflight.lookups import look_up
from sae_lens_atm.training.run_file import load_run
from sae_lens_atm.yaml_files import shipped_config


def shipped(name, *overrides):
    return load_run(shipped_config(name), overrides).runner


@pytest.mark.parametrize("name", ["gemma-2-2b-l12-16k", "gpt2-small"])
def test_what_is_not_reached_is_said(name):
    facts = check_run(load_run(shipped_config(name)), dry=True)
    assert "public facts, not the Hub" in facts["checked"]
    assert facts["columns"].startswith("not checked: the dataset")
    assert "time" not in facts


def test_an_unknown_model_is_not_checked_and_no_error():
    facts = look_up(shipped("gemma-2-2b-l12-16k", "model_name=someone/something"))
    assert facts["checked"].startswith("not checked: the model (OSError")
    assert "memory" not in facts
    mamba = look_up(shipped("gpt2-small", "model_class_name=HookedMamba"))
    assert "HookedMamba" in mamba["checked"]


@pytest.mark.parametrize(
    ("name", "override", "start", "names"),
    [
        ("gemma-2-2b-l12-16k", "hook_name=model.layers.26", "hook_name", "model.layers.25"),
        ("gemma-2-2b-l12-16k", "sae.d_in=2048", "sae.d_in", "2304"),
        ("gemma-2-2b-l12-16k", "model_name=./nowhere", "model_name", "./nowhere"),
        ("gpt2-small", "context_size=100000", "context_size", "at most 1024"),
        ("gemma-2-2b-l12-16k", "context_size=100000", "context_size", "at most 8192"),
        ("gpt2-small", "hook_name=blocks.12.hook_resid_post", "hook_name", "blocks."),
        ("gpt2-small", "model_name=gpt3", "model_name", "gpt3 not found"),
        ("pythia-160m", "sae.d_in=512", "sae.d_in", "768"),
    ],
)
def test_what_does_not_fit_is_an_error(name, override, start, names):
    with pytest.raises(SettingsError) as caught:
        look_up(shipped(name, override))
    line = str(caught.value)
    assert line.startswith(f"{start} ")
    assert names in line
    assert "\n" not in line


# --- what is at hand -----------------------------------------------------------------------------


def test_a_local_model_and_text(language_model_yaml, gemma_folder):
    facts = look_up(load_run(language_model_yaml).runner)
    model = AutoModelForCausalLM.from_pretrained(gemma_folder)
    count = sum(p.numel() for p in model.parameters())
    assert facts["checked"].startswith(f"hook and d_in, from its config.json: {count:,} parameters")
    assert facts["columns"] == "text, tokenised during training"


def test_columns_of_datasets(language_model_yaml, token_dataset, tmp_path):
    token_dataset.save_to_disk("tokens")
    Dataset.from_list([{"words": "a b", "label": 1}]).save_to_disk("other")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/a.jsonl").write_text(json.dumps({"meta": 1, "text": "some"}) + "\n")

    def columns(*overrides):
        return look_up(load_run(language_model_yaml, overrides).runner)["columns"]

    assert columns("dataset_path=tokens") == "tokens, tokenised"
    assert columns("dataset_path=lines") == "text, tokenised during training"
    with pytest.raises(SettingsError, match=r"^dataset_path .* words, label"):
        columns("dataset_path=other")
    with pytest.raises(SettingsError, match=r"^context_size .* 16"):
        columns("dataset_path=tokens", "context_size=17")
    assert columns("dataset_path=nowhere").startswith("not checked: the dataset")


def test_text_that_is_compressed_as_the_pile(language_model_yaml, tmp_path):
    zstandard = pytest.importorskip("zstandard")  # a dependency, where a package manager put it
    (tmp_path / "pile").mkdir()
    line = json.dumps({"text": "some"}).encode() + b"\n"
    (tmp_path / "pile/00.jsonl.zst").write_bytes(zstandard.compress(line))
    facts = look_up(load_run(language_model_yaml, ["dataset_path=pile"]).runner)
    assert facts["columns"] == "text, tokenised during training"


def test_a_gpu_that_is_too_small_is_said(monkeypatch):
    class Properties:
        total_memory = 8 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    cfg = shipped("gemma-2-2b-l12-16k")
    assert look_up(cfg)["memory"].endswith("; TOO MUCH: this GPU has 8.0")
    Properties.total_memory = 80 * 2**30
    assert look_up(cfg)["memory"].endswith("; this GPU has 80.0")
