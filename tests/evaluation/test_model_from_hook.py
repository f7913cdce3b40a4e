import pytest
import torch
from sae_lens.load_model import HookedProxyLM
from torch import nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
)

from sae_lens_atm.evaluation.model_from_hook import ModelFromHook, model_from_hook
from tests.evaluation.models import lively

LAYERS = 4
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
GEMMA = Gemma2Config(**SHAPE, head_dim=8, sliding_window=4, final_logit_softcapping=3.0)
GPT2 = GPT2Config(vocab_size=64, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=64)
TRANSFORMERS = [
    *((GEMMA, f"model.layers.{layer}") for layer in range(LAYERS)),
    (GEMMA, "model.layers.1.mlp"),
    (GEMMA, "model.layers.2.self_attn"),
    (GEMMA, "model.layers.0.input_layernorm"),
    (GEMMA, "model.embed_tokens"),
    (GEMMA, "model.norm"),
    (GPT2, "transformer.h.1"),
    (GPT2, "transformer.h.2.attn"),
    (LlamaConfig(**SHAPE), "model.layers.2"),
]
TRANSFORMER_LENS = [
    "hook_embed",
    "blocks.0.hook_resid_pre",
    "blocks.1.hook_resid_post",
    "blocks.3.hook_resid_post",
    "blocks.2.hook_mlp_out",
    "blocks.1.attn.hook_z",
    "ln_final.hook_normalized",
]


@pytest.fixture
def tokens():
    return torch.randint(0, 64, (3, 12))


def transformers_model(config, hook_name):
    model = lively(AutoModelForCausalLM.from_config(config))
    return HookedProxyLM(model.eval(), None, [hook_name])


def transformer_lens_model(**more):
    cfg = HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=16,
        n_ctx=16,
        d_head=8,
        n_heads=2,
        d_vocab=64,
        act_fn="gelu",
        **more,
    )
    model = HookedTransformer(cfg)
    nn.init.normal_(model.unembed.b_U)
    return lively(model)


def check(model, hook_name, tokens):
    """Compare with a pass of all layers. Return how many layers a further pass computes."""
    from_hook = ModelFromHook(model, hook_name, {})
    inner = getattr(model, "model", model)
    layers = next(m for m in inner.modules() if isinstance(m, nn.ModuleList))
    forwards = [layer.forward for layer in layers]
    calls = []
    with torch.no_grad():
        full, hidden = from_hook.full_pass(tokens)
        assert torch.allclose(from_hook.unembedding.logits(hidden), model(tokens), atol=1e-5)
        new = torch.randn_like(full.activation)
        expected = model.run_with_hooks(
            tokens, fwd_hooks=[(hook_name, lambda *_, **__: new)], return_type="logits"
        )
        attention = [getattr(layer, "attn", getattr(layer, "self_attn", None)) for layer in layers]
        handles = [a.register_forward_hook(lambda *_: calls.append(1)) for a in attention]
        found = from_hook.unembedding.logits(from_hook.replaced(tokens, full, new))
        for handle in handles:
            handle.remove()
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert from_hook.is_exact(tokens)
    assert [layer.forward for layer in layers] == forwards
    assert torch.equal(model(tokens), model(tokens))  # all layers compute again
    return len(calls)


@pytest.mark.parametrize(("config", "hook_name"), TRANSFORMERS, ids=lambda x: str(x)[:24])
def test_a_transformers_model(config, hook_name, tokens):
    computed = check(transformers_model(config, hook_name), hook_name, tokens)
    parts = hook_name.split(".")
    layer = next((int(part) for part in parts if part.isdigit()), 0)
    assert computed == LAYERS - layer - (parts[-1].isdigit())


@pytest.mark.parametrize("hook_name", TRANSFORMER_LENS)
def test_a_hooked_transformer(hook_name, tokens):
    computed = check(transformer_lens_model(), hook_name, tokens)
    parts = hook_name.split(".")
    layer = int(parts[1]) if parts[0] == "blocks" else 0
    assert computed == LAYERS - layer - (parts[-1] == "hook_resid_post")


@pytest.mark.parametrize("positions", ["rotary", "standard"])
def test_positions_and_softcap_of_transformer_lens(positions, tokens):
    more = {"rotary_dim": 8} if positions == "rotary" else {}
    model = transformer_lens_model(
        positional_embedding_type=positions, output_logits_soft_cap=2.0, **more
    )
    check(model, "blocks.1.hook_resid_post", tokens)


def test_what_is_kept_does_not_change_later(tokens):
    model = transformers_model(GEMMA, "model.layers.1.mlp")
    from_hook = ModelFromHook(model, "model.layers.1.mlp", {})
    with torch.no_grad():
        full, _ = from_hook.full_pass(tokens)
        before = full.activation.clone(), full.below.clone()
        from_hook.replaced(tokens, full, torch.zeros_like(full.activation))
        again = from_hook.full_pass(tokens)[0]
    for a, b, c in zip(before, (full.activation, full.below), again[:3:2], strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


# --- models for which it would not be exact ------------------------------------------------------


def test_logits_that_the_model_scales(tokens):
    config = CohereConfig(**SHAPE, logit_scale=0.1)
    assert (
        model_from_hook(transformers_model(config, "model.layers.1"), "model.layers.1", {}, tokens)
        is None
    )


def test_a_layer_that_reads_a_lower_one(tokens):
    model = transformers_model(GEMMA, "model.layers.1")
    first, last = model.model.model.layers[0], model.model.model.layers[3]
    seen = []
    first.mlp.register_forward_hook(lambda _m, _i, output: seen.append(output))
    last.register_forward_hook(lambda _m, _i, output: output + seen.pop())
    assert model_from_hook(model, "model.layers.1", {}, tokens) is None


def test_a_hook_on_the_logits(tokens):
    model = transformers_model(GEMMA, "lm_head")
    assert model_from_hook(model, "lm_head", {}, tokens) is None


def test_a_model_without_an_unembedding(tokens):
    assert model_from_hook(nn.Linear(2, 2), "x", {}, tokens) is None
