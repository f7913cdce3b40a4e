"""The figures are those of SAELens' own evaluation, which runs the whole model every time.

In float64, because the scores are ratios of small differences in random models.
"""

import math
from dataclasses import replace

import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from sae_lens_atm.evaluation import language_model, next_token_loss
from sae_lens_atm.evaluation.contrastive_stories import contrastive_figures
from sae_lens_atm.evaluation.language_model import (
    HeldOutTokens,
    flat_heads,
    language_model_figures,
)
from sae_lens_atm.evaluation.model_from_hook import ModelFromHook
from sae_lens_atm.evaluation.synthetic import is_signed
from sae_lens_atm.training.run_file import load_run
from tests.conftest import CONTEXT
from tests.evaluation.models import lively
from tests.helpers import make_sae, train


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(4, 64, (7, CONTEXT), generator=generator)
    rows[:, 0] = 0  # <bos>
    rows[2, 5] = 1  # <eos>
    return HeldOutTokens(list(rows.split(3)), CONTEXT, 3)


@pytest.fixture
def cfg(language_model_yaml):
    return load_run(language_model_yaml).runner


@pytest.fixture
def gemma(gemma_folder):
    model = lively(AutoModelForCausalLM.from_pretrained(gemma_folder)).double()
    model.config.final_logit_softcapping = 4.0
    return HookedProxyLM(model, AutoTokenizer.from_pretrained(gemma_folder))


@pytest.fixture
def hooked(hooked_model, monkeypatch):
    for parameter in hooked_model.parameters():
        monkeypatch.setattr(parameter, "data", 10 * parameter.data.double())
    return hooked_model


def sae_at(hook_name, head_index=None, d_in=16):
    sae = train(make_sae(d_in=d_in, d_sae=32, k=4, dtype="float64"), 3).eval()
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_head_index = hook_name, head_index
    return sae


def of_saelens(sae, model, tokens, cfg, monkeypatch):
    again = HeldOutTokens(tokens.batches, CONTEXT, 3)
    monkeypatch.setattr(language_model, "model_from_hook", lambda *_: None)
    with pytest.warns(UserWarning, match="whole model three times"):
        return language_model_figures(sae, model, again, cfg)


def check(sae, model, tokens, cfg, monkeypatch):
    figures, alive = language_model_figures(sae, model, tokens, cfg)
    for name in (
        "decoder_projection",
        "saved_bits",
        "description_length",
    ):  # they need the shared passes
        assert math.isfinite(figures.pop(name, 0.0))  # the last two not with heads
    expected, expected_alive = of_saelens(sae, model, tokens, cfg, monkeypatch)
    assert list(figures) == list(expected)
    assert figures == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert torch.equal(alive, expected_alive)
    assert {"ce_loss_score", "kl_div_score"} <= figures.keys()


@pytest.mark.parametrize("excluded", [False, True, [7, 9]])
@pytest.mark.parametrize(
    "hook_name",
    ["model.layers.0", "model.layers.1", "model.layers.1.mlp", "model.layers.0.self_attn"],
)
def test_a_transformers_model(hook_name, excluded, gemma, tokens, cfg, monkeypatch):
    cfg.exclude_special_tokens = excluded
    monkeypatch.setattr(next_token_loss, "LOGITS", 5 * 64)
    check(sae_at(hook_name), gemma, tokens, cfg, monkeypatch)


@pytest.mark.parametrize("excluded", [False, [0, 7, 9]])
@pytest.mark.parametrize(
    ("hook_name", "head_index", "d_in"),
    [
        ("blocks.0.hook_resid_post", None, 16),
        ("blocks.1.hook_mlp_out", None, 16),
        ("blocks.0.attn.hook_z", None, 16),
        ("blocks.1.attn.hook_q", 1, 8),
    ],
)
def test_a_hooked_transformer(
    hook_name, head_index, d_in, excluded, hooked, tokens, cfg, monkeypatch
):
    cfg.exclude_special_tokens = excluded
    check(sae_at(hook_name, head_index, d_in), hooked, tokens, cfg, monkeypatch)


def test_padding_on_the_left(hooked, gemma, tokens, cfg, monkeypatch):
    gemma.tokenizer.padding_side = "left"
    monkeypatch.setattr(hooked, "tokenizer", gemma.tokenizer)
    padded = gemma.tokenizer.pad_token_id
    for batch in tokens.batches:
        batch[0, :5] = padded
    check(sae_at("blocks.0.hook_resid_post"), hooked, tokens, cfg, monkeypatch)


def test_an_sae_that_reshapes_heads_is_left_as_it_was(hooked, tokens, cfg, monkeypatch):
    sae = sae_at("blocks.0.attn.hook_z")
    sae.cfg = replace(sae.cfg, reshape_activations="hook_z")
    sae.cfg.metadata.hook_name = "blocks.0.attn.hook_z"
    sae.turn_on_forward_pass_hook_z_reshaping()
    check(sae, hooked, tokens, cfg, monkeypatch)
    assert sae.hook_z_reshaping_mode
    # Stored activations have no dimension of heads either.
    tokens.stored_inputs = [torch.randn(7, sae.cfg.d_in), torch.randn(6, sae.cfg.d_in)]
    figures, _ = language_model_figures(sae, hooked, tokens, cfg)
    assert figures["dead_window"] == figures["evaluated_samples"] + 13
    with flat_heads(sae):
        assert not is_signed(sae)
        assert contrastive_figures(sae, [(torch.randn(3, 16), torch.randn(4, 16))])
    assert sae.hook_z_reshaping_mode


def test_further_saes_run_the_model_from_the_hook_on_only(gemma, tokens, cfg, monkeypatch):
    passes = []
    full_pass, replaced = ModelFromHook.full_pass, ModelFromHook.replaced
    monkeypatch.setattr(
        ModelFromHook, "full_pass", lambda *args: passes.append("full") or full_pass(*args)
    )
    monkeypatch.setattr(
        ModelFromHook, "replaced", lambda *args: passes.append("from hook") or replaced(*args)
    )
    # One to check it; for each of three batches the original, zeros and the SAE.
    first, _ = language_model_figures(sae_at("model.layers.0"), gemma, tokens, cfg)
    assert passes == ["full", "from hook"] + 3 * ["full", "from hook", "from hook"]
    passes.clear()
    torch.manual_seed(1)
    second, _ = language_model_figures(sae_at("model.layers.0"), gemma, tokens, cfg)
    assert passes == 3 * ["from hook"]
    assert first["ce_loss_score"] != second["ce_loss_score"]


def test_the_number_of_batches_is_reported(gemma, tokens, cfg):
    seen = []

    def on_batch(done, total):
        seen.append((done, total))

    language_model_figures(sae_at("model.layers.0"), gemma, tokens, cfg, on_batch)
    assert seen == [(0, 3), (1, 3), (2, 3)]


def test_an_evaluation_that_is_stopped_can_be_repeated(gemma, tokens, cfg, monkeypatch):
    def stop(done, _):
        if done == 2:
            raise KeyboardInterrupt

    sae = sae_at("model.layers.1")
    with pytest.raises(KeyboardInterrupt):
        language_model_figures(sae, gemma, tokens, cfg, stop)
    check(sae, gemma, tokens, cfg, monkeypatch)
