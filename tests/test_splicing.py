import re
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, HookedSAETransformer, SAETransformerBridge
from transformers import Gemma2ForCausalLM

from tests.conftest import CONTEXT
from tests.helpers import make_sae, train

DOCS = (Path(__file__).parent.parent / "docs/splicing.md").read_text(encoding="utf-8")


@pytest.fixture(params=["HookedSAETransformer", "SAETransformerBridge"])
def build(request, hooked_model, gemma_folder):
    if request.param == "SAETransformerBridge":
        return lambda: SAETransformerBridge.boot_transformers(str(gemma_folder), device="cpu")
    return lambda: hooked_sae_model(hooked_model)


def hooked_sae_model(hooked_model):
    model = HookedSAETransformer(hooked_model.cfg)
    model.load_state_dict(hooked_model.state_dict())
    return model


@pytest.fixture
def model(build):
    return build()


@pytest.fixture
def plain(build):
    """The same model, never spliced: in a bridge plain hooks do not survive that."""
    return build()


@pytest.fixture
def hook(model):
    """The end of the second block, as each of them calls it."""
    bridged = isinstance(model, SAETransformerBridge)
    return "blocks.1.hook_out" if bridged else "blocks.1.hook_resid_post"


@pytest.fixture
def acts_hook(hook):
    return f"{hook}.hook_sae_acts_post"


@pytest.fixture(params=["inference save", "checkpoint"])
def sae(request, model, hook, tmp_path):
    """Trained on the model's activations, saved, loaded."""
    tokens = torch.randint(4, 64, (20, 16, CONTEXT))
    with torch.no_grad():
        batches = [model.run_with_cache(t)[1][hook].flatten(0, 1) for t in tokens]
    trained = make_sae(d_in=16, d_sae=64, k=8)
    trained.cfg.metadata.hook_name = hook
    train(trained, 30, data=lambda step: batches[step % 20])
    save = trained.save_model if request.param == "checkpoint" else trained.save_inference_model
    save(tmp_path)
    return SAE.load_from_disk(tmp_path)


@pytest.fixture
def tokens():
    return torch.randint(4, 64, (3, CONTEXT))


@torch.no_grad()
def logits_of(model, tokens, hook, change):
    """Of the model without SAEs, its activations changed at the hook."""
    return model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda x, **_: change(x))])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_with_the_error_term_nothing_changes(model, sae, tokens):
    close(model.run_with_saes(tokens, saes=[sae], use_error_term=True), model(tokens))


@torch.no_grad()
def test_without_it_the_model_sees_the_reconstruction(model, plain, hook, sae, tokens):
    logits = model.run_with_saes(tokens, saes=[sae], use_error_term=False)
    close(logits, logits_of(plain, tokens, hook, sae.forward))
    assert not torch.allclose(logits, model(tokens), atol=1e-2)
    assert model.acts_to_saes == {}  # and it is taken out again


@torch.no_grad()
def test_the_cache_has_the_activations(model, hook, acts_hook, sae, tokens):
    _, before = model.run_with_cache(tokens)
    _, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    close(cache[acts_hook], sae.encode(before[hook]))
    assert 0 < (cache[acts_hook] > 0).sum(-1).float().mean() < 64


@torch.no_grad()
def test_ablating_a_latent_takes_its_contribution_away(model, plain, hook, acts_hook, sae, tokens):
    _, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    latent = int(cache[acts_hook].sum((0, 1)).argmax())

    def ablate(acts, hook):  # noqa: ARG001
        acts[..., latent] = 0
        return acts

    with model.saes(saes=[sae], use_error_term=True):
        logits = model.run_with_hooks(tokens, fwd_hooks=[(acts_hook, ablate)])
    direction = sae.W_dec[latent]
    expected = logits_of(
        plain, tokens, hook, lambda x: x - sae.encode(x)[..., latent, None] * direction
    )
    close(logits, expected)
    assert not torch.allclose(logits, model(tokens), atol=1e-3)


@torch.no_grad()
def test_steering_with_a_row_of_the_decoder(model, plain, hook, acts_hook, sae, tokens):
    """As an activation that is added in the SAE, and as a direction added without one."""

    def push(acts, hook):  # noqa: ARG001
        acts[..., 7] += 3.0
        return acts

    with model.saes(saes=[sae], use_error_term=True):
        logits = model.run_with_hooks(tokens, fwd_hooks=[(acts_hook, push)])
    close(logits, logits_of(plain, tokens, hook, lambda x: x + 3.0 * sae.W_dec[7]))
    assert not torch.allclose(logits, model(tokens), atol=1e-3)


@torch.no_grad()
def test_the_name_of_a_module_has_to_be_translated(gemma_folder, tokens, caplog):
    bridge = SAETransformerBridge.boot_transformers(str(gemma_folder), device="cpu")
    sae = make_sae(d_in=16, d_sae=64).eval()
    sae.cfg.metadata.hook_name = "model.layers.1"
    bridge.add_sae(sae)
    assert "No hook found for model.layers.1" in caplog.text
    assert bridge.acts_to_saes == {}
    seen = []
    hugging_face = Gemma2ForCausalLM.from_pretrained(gemma_folder)
    hugging_face.model.layers[1].register_forward_hook(lambda *args: seen.append(args[2]))
    hugging_face(tokens)
    close(seen[0], bridge.run_with_cache(tokens)[1]["blocks.1.hook_out"])


def test_the_page_runs(hooked_model, monkeypatch, tmp_path):
    model = hooked_sae_model(hooked_model)
    sae = make_sae(d_in=16, d_sae=64)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    train(sae, 20).save_inference_model(tmp_path / "my-sae")
    (source,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    source = source.replace("torch.randint(1000,", "torch.randint(64,")
    monkeypatch.setattr(
        HookedSAETransformer, "from_pretrained_no_processing", lambda *_, **__: model
    )
    scope = {}
    exec(source, scope)
    plain = model(scope["tokens"])
    close(scope["logits"], plain)
    for name in ("reconstructed", "ablated", "steered"):
        assert not torch.allclose(scope[name], plain, atol=1e-3), name
