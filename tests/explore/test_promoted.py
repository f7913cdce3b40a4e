import pytest
import torch

from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.explore.promoted import promoted_tokens
from sae_lens_atm.training.run_file import load_run


def test_rows_go_through_the_last_norm_and_the_unembedding(language_model_yaml):
    cfg = load_run(language_model_yaml).runner
    model = load_language_model(cfg)
    gain = 1 + torch.linspace(-0.5, 0.5, 16)
    with torch.no_grad():
        model.model.model.norm.weight.copy_(gain - 1)  # Gemma's gain is 1 + weight
    decoder = 3 * torch.randn(5, 16)
    found = promoted_tokens(model, cfg.hook_name, {}, decoder, lambda _: None)
    assert found is not None
    unit = decoder / decoder.norm(dim=1, keepdim=True)
    logits = (unit * gain) @ model.model.lm_head.weight.detach().T
    logits -= logits.mean(1, keepdim=True)
    high, low = logits.topk(8), logits.topk(8, largest=False)
    assert found.tokens.tolist() == high.indices.tolist()
    assert found.lowest_tokens.tolist() == low.indices.tolist()
    torch.testing.assert_close(torch.from_numpy(found.logits), high.values, rtol=1e-4, atol=1e-5)


def test_a_hooked_transformer_has_folded_its_norm(hooked_model):
    decoder = torch.randn(3, 16)
    found = promoted_tokens(hooked_model, "blocks.1.hook_resid_post", {}, decoder, lambda _: None)
    assert found is not None
    assert found.tokens.shape == (3, 8)


def test_rows_of_another_width_promote_nothing(hooked_model):
    hook, decoder = "blocks.1.hook_resid_post", torch.randn(3, 8)
    assert promoted_tokens(hooked_model, hook, {}, decoder, lambda _: None) is None


@pytest.mark.parametrize(
    ("hook", "is_in_the_stream"),
    [
        ("blocks.1.hook_resid_mid", True),
        ("blocks.1.hook_mlp_out", True),
        ("blocks.1.ln2.hook_normalized", False),
        ("blocks.1.attn.hook_z", False),
    ],
)
def test_rows_outside_of_the_residual_stream_promote_nothing(hooked_model, hook, is_in_the_stream):
    found = promoted_tokens(hooked_model, hook, {}, torch.randn(3, 16), lambda _: None)
    assert (found is not None) == is_in_the_stream
