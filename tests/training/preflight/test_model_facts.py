import time

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.preflight import model_facts
from sae_lens_atm.training.preflight.model_facts import (
    NotChecked,
    check_hook_without_weights,
    is_at_hand,
    look_up_model,
    shape_of,
    within,
)
from sae_lens_atm.training.run_file import load_run
from sae_lens_atm.yaml_files import shipped_config


def shipped(name, *overrides):
    return load_run(shipped_config(name), overrides).runner


# --- the models of the shipped files, known offline ----------------------------------------------


def test_gemma_2_2b_is_counted_as_by_hand():
    cfg = shipped("gemma-2-2b-l12-16k")
    model = shape_of(cfg, look_up_model(cfg, online=False))
    attention = 2 * 2304 * (8 * 256) + 2 * 2304 * (4 * 256)
    mlp = 3 * 2304 * 9216
    norms = 4 * 2304
    embedding = 256_000 * 2304  # tied
    assert model.parameters == embedding + 26 * (attention + mlp + norms) + 2304 == 2_614_341_888
    assert (model.layers, model.hidden, model.vocabulary) == (26, 2304, 256_000)
    assert model.dtype == torch.bfloat16


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
    assert shape_of(cfg, look_up_model(cfg, online=False)).parameters == pytest.approx(
        parameters, rel=1e-3
    )


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
        assert shape_of(cfg, look_up_model(cfg, online=False)).dtype == loaded.dtype == dtype


def test_the_hook_of_a_model_that_looks_for_padding(language_model_yaml, tmp_path):
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 64}
    GPT2Config(**shape, pad_token_id=0).save_pretrained(tmp_path)
    cfg = load_run(language_model_yaml, [f"model_name={tmp_path}"]).runner
    cfg.hook_name = "transformer.h.1"
    meta = look_up_model(cfg, online=False)
    check_hook_without_weights(cfg, meta)
    assert meta.config.pad_token_id == 0
    cfg.hook_name = "transformer.h.2"
    with pytest.raises(SettingsError, match=r"^hook_name"):
        check_hook_without_weights(cfg, meta)


def test_a_model_is_at_hand_in_a_folder_or_in_the_cache(language_model_yaml):
    assert is_at_hand(load_run(language_model_yaml).runner)
    for name in ("gpt2", "someone/something", "not a name"):
        named = load_run(language_model_yaml, [f"model_name={name}"]).runner
        assert not is_at_hand(named)
    with pytest.raises(SettingsError, match="model_name is 'gpt3'"):
        is_at_hand(shipped("gpt2-small", "model_name=gpt3"))


# --- the Hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "."])
def test_a_folder_without_a_model(language_model_yaml, name):
    cfg = load_run(language_model_yaml, [f"model_name='{name}'"]).runner
    with pytest.raises(SettingsError, match=r"^model_name is .*there is no config\.json"):
        look_up_model(cfg, online=False)


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
    monkeypatch.setattr(model_facts, "get_session", lambda: time.sleep(30))
    monkeypatch.setattr(model_facts, "_HUB_TIMEOUT", 0.05)
    assert not model_facts.hub_answers()
    assert time.monotonic() - start < 5


def test_answers_and_errors_come_through():
    assert within(5, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)
