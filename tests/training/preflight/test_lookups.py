import json
import time

import pytest
import torch
from datasets import Dataset
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM

from sae_lens_atm.data import language_model as language_models
from sae_lens_atm.data.language_model import NotChecked, look_up_model, measure, within
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.preflight.checks import plan
from sae_lens_atm.training.preflight.lookups import look_up
from sae_lens_atm.training.run_file import load_run, shipped_config


def shipped(name, *overrides):
    return load_run(shipped_config(name), overrides).runner


# --- the models of the shipped files, known offline ----------------------------------------------


def test_gemma_2_2b_is_counted_as_by_hand():
    cfg = shipped("gemma-2-2b-l12-16k")
    model = measure(cfg, look_up_model(cfg, online=False))
    attention = 2 * 2304 * (8 * 256) + 2 * 2304 * (4 * 256)
    mlp = 3 * 2304 * 9216
    norms = 4 * 2304
    embedding = 256_000 * 2304  # tied
    assert model.parameters == embedding + 26 * (attention + mlp + norms) + 2304 == 2_614_341_888
    assert (model.layers, model.hidden, model.vocabulary) == (26, 2304, 256_000)
    assert model.dtype == torch.bfloat16
    # layers 0 to 12, where SAELens stops, and no logits
    assert model.flops == 13 * (2 * (attention + mlp) + 4 * 1024 * 8 * 256)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # as published, but for what TransformerLens adds: an unembedding of its own in GPT-2, and
        # its bias in both
        ("gemma-2-9b-l20-16k", 9_241_705_984),
        ("gpt2-small", 124_439_808 + 50_257 * 768 + 50_257),
        ("pythia-160m", 162_322_944 + 50_304),
    ],
)
def test_the_other_models_are_those_published(name, parameters):
    cfg = shipped(name)
    assert measure(cfg, look_up_model(cfg, online=False)).parameters == pytest.approx(
        parameters, rel=1e-3
    )


@pytest.mark.parametrize("name", ["gemma-2-2b-l12-16k", "gpt2-small"])
def test_what_is_not_reached_is_said(name):
    facts = plan(load_run(shipped_config(name)), dry=True)
    assert "public facts, not the Hub" in facts["checked"]
    assert facts["columns"].startswith("not checked: the dataset")
    assert "not measured" in facts["time"]


def test_an_unknown_model_is_not_checked_and_no_error():
    facts = look_up(shipped("gemma-2-2b-l12-16k", "model_name=someone/something"))
    assert facts["checked"].startswith("not checked: the model (OSError")
    assert {"memory", "time"}.isdisjoint(facts)
    mamba = look_up(shipped("gpt2-small", "model_class_name=HookedMamba"))
    assert "HookedMamba" in mamba["checked"]


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("gemma-2-2b-l12-16k", "hook_name=model.layers.26", "'model.layers.26': no such hook"),
        ("gemma-2-2b-l12-16k", "sae.d_in=2048", "sae.d_in is 2048: allowed is 2304"),
        ("gemma-2-2b-l12-16k", "model_name=./nowhere", "model_name is './nowhere': no such model"),
        ("gpt2-small", "hook_name=blocks.12.hook_resid_post", "blocks.12.hook_resid_post"),
        ("gpt2-small", "model_name=gpt3", "model_name is 'gpt3': gpt3 not found"),
        ("pythia-160m", "sae.d_in=512", "sae.d_in is 512: allowed is 768"),
    ],
)
def test_what_does_not_fit_is_an_error(name, override, message):
    with pytest.raises(SettingsError) as caught:
        look_up(shipped(name, override))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- what is at hand -----------------------------------------------------------------------------


def test_a_local_model_and_text(language_model_yaml, gemma_folder):
    facts = look_up(load_run(language_model_yaml).runner)
    model = AutoModelForCausalLM.from_pretrained(gemma_folder)
    count = sum(p.numel() for p in model.parameters())
    assert facts["checked"].startswith(f"hook and d_in, from its config.json: {count:,} parameters")
    assert facts["columns"] == "text, tokenised on the way"


def test_the_dtype_is_that_of_the_loader(language_model_yaml, gemma_folder):
    config = AutoConfig.from_pretrained(gemma_folder)
    for override, dtype in [
        ("autocast=false", config.dtype),
        ("model_from_pretrained_kwargs={dtype: bfloat16}", torch.bfloat16),
        ("model_from_pretrained_kwargs={torch_dtype: float16}", torch.float16),
    ]:
        cfg = load_run(language_model_yaml, [override]).runner
        given = cfg.model_from_pretrained_kwargs
        loaded = AutoModelForCausalLM.from_pretrained(gemma_folder, **given)
        assert measure(cfg, look_up_model(cfg, online=False)).dtype == loaded.dtype == dtype


def test_columns_of_datasets(language_model_yaml, token_dataset, tmp_path):
    token_dataset.save_to_disk("tokens")
    Dataset.from_list([{"words": "a b", "label": 1}]).save_to_disk("other")
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines/a.jsonl").write_text(json.dumps({"meta": 1, "text": "some"}) + "\n")

    def columns(*overrides):
        return look_up(load_run(language_model_yaml, overrides).runner)["columns"]

    assert columns("dataset_path=tokens") == "tokens, tokenised"
    assert columns("dataset_path=lines") == "text, tokenised on the way"
    with pytest.raises(SettingsError, match="has the columns words, label: needed is one of"):
        columns("dataset_path=other")
    with pytest.raises(SettingsError, match="context_size is 17: allowed is at most 16, the"):
        columns("dataset_path=tokens", "context_size=17")
    assert columns("dataset_path=nowhere").startswith("not checked: the dataset")


def test_text_that_is_compressed_as_the_pile(language_model_yaml, tmp_path):
    zstandard = pytest.importorskip("zstandard")  # a dependency, where a package manager put it
    (tmp_path / "pile").mkdir()
    line = json.dumps({"text": "some"}).encode() + b"\n"
    (tmp_path / "pile/00.jsonl.zst").write_bytes(zstandard.compress(line))
    facts = look_up(load_run(language_model_yaml, ["dataset_path=pile"]).runner)
    assert facts["columns"] == "text, tokenised on the way"


def test_an_ordinary_plan_looks_nothing_up(language_model_yaml, monkeypatch):
    lookup = "sae_lens_atm.training.preflight.checks.look_up"
    monkeypatch.setattr(lookup, lambda _: pytest.fail("looked up"))
    assert "checked" not in plan(load_run(language_model_yaml))


def test_a_gpu_that_is_too_small_is_said(monkeypatch):
    class Properties:
        total_memory = 8 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    cfg = shipped("gemma-2-2b-l12-16k")
    assert look_up(cfg)["memory"].endswith("; TOO MUCH: this GPU has 8.0")
    Properties.total_memory = 80 * 2**30
    assert look_up(cfg)["memory"].endswith("; this GPU has 80.0")


# --- the Hub -------------------------------------------------------------------------------------


def test_a_name_that_the_hub_does_not_know(monkeypatch):
    cfg = shipped("gemma-2-2b-l12-16k", "model_name=google/gemma-2-2bb")

    def answer(kind):
        def from_pretrained(*_, **__):
            raise OSError("no such file") from kind.__new__(kind)

        monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)

    answer(RepositoryNotFoundError)
    with pytest.raises(SettingsError, match="'google/gemma-2-2bb': no such model on the Hub, or"):
        look_up_model(cfg, online=True)
    answer(GatedRepoError)  # it is there, and not for everybody
    with pytest.raises(NotChecked):
        look_up_model(cfg, online=True)
    known = look_up_model(shipped("gemma-2-2b-l12-16k"), online=True)
    assert known.source == "public facts, not the Hub"


def test_nothing_is_waited_for(monkeypatch):
    start = time.monotonic()
    with pytest.raises(NotChecked, match="no answer within 0 s"):
        within(0.05, lambda: time.sleep(30))
    monkeypatch.setattr(language_models, "get_session", lambda: time.sleep(30))
    monkeypatch.setattr(language_models, "_HUB", 0.05)
    assert not language_models.hub_answers()
    assert time.monotonic() - start < 5


def test_answers_and_errors_come_through():
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)
