import pytest
import torch
from sae_lens.training.activations_store import ActivationsStore

from sae_lens_atm.evaluation import language_model
from sae_lens_atm.evaluation.language_model import (
    HeldOutTokens,
    hold_out,
    language_model_figures,
    make_store,
)
from sae_lens_atm.metrics import HierarchyScore
from sae_lens_atm.training.run_file import load_run
from tests.conftest import CONTEXT
from tests.helpers import make_sae, train

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def sae():
    sae = train(make_sae(d_in=16, d_sae=32, k=4), 3).eval()
    sae.cfg.metadata.hook_name = HOOK
    return sae


@pytest.fixture
def cfg(language_model_yaml):
    return load_run(language_model_yaml, [f"hook_name={HOOK}", "n_eval_batches=2"]).runner


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(4, 64, (3, CONTEXT), generator=generator) for _ in range(2)]
    return HeldOutTokens(batches, CONTEXT, 3)


def test_batches_come_in_a_circle(tokens):
    first, second, again = (tokens.get_batch_tokens(3) for _ in range(3))
    assert first is again
    assert first is not second
    tokens.reset_input_dataset()
    assert tokens.get_batch_tokens() is first


def test_the_first_tokens_of_a_store_are_held_out(cfg, hooked_model, token_dataset):
    store = ActivationsStore.from_config(hooked_model, cfg, override_dataset=token_dataset)
    held_out = hold_out(store, cfg)
    rows = torch.stack([torch.as_tensor(row["tokens"]) for row in token_dataset.select(range(12))])
    assert torch.equal(torch.cat(held_out.batches), rows[:8])
    assert torch.equal(store.get_batch_tokens(), rows[8:])


def test_a_saved_dataset_reaches_the_store(cfg, hooked_model, token_dataset, tmp_path):
    token_dataset.save_to_disk(tmp_path / "tokens")
    cfg.dataset_path = str(tmp_path / "tokens")
    store = make_store(cfg, hooked_model)
    assert torch.equal(store.get_batch_tokens(1)[0], torch.as_tensor(token_dataset[0]["tokens"]))


def test_figures_by_hand(sae, cfg, tokens, hooked_model):
    figures, alive = language_model_figures(sae, hooked_model, tokens, cfg)
    every = torch.cat(tokens.batches)
    with torch.no_grad():
        _, cache = hooked_model.run_with_cache(every, names_filter=[HOOK], prepend_bos=False)
        x = cache[HOOK].flatten(0, 1)
        acts = sae.encode(x)
        error = (x - sae.decode(acts)).square()
    assert figures["l0"] == pytest.approx((acts > 0).sum(-1).float().mean().item())
    assert figures["mse"] == pytest.approx(error.sum(-1).mean().item(), rel=1e-4)
    variance = (x - x.mean(0)).square()
    expected = 1 - (error.sum() / variance.sum()).item()
    assert figures["explained_variance"] == pytest.approx(expected, rel=1e-4)
    assert torch.equal(alive, (acts > 0).any(0))
    assert figures["dead_latents"] == int((~alive).sum())
    assert figures["evaluated_samples"] == figures["dead_window"] == every.numel()
    assert "ce_loss_score" in figures


def test_dead_latents_fire_on_no_stored_input_either(sae, cfg, tokens, hooked_model):
    sae.b_enc.data[:3] -= 100
    before, fired = language_model_figures(sae, hooked_model, tokens, cfg)
    assert not fired[:3].any()
    x = 1e6 * sae.W_enc.T[:2]
    acts = sae.encode(x) > 0
    assert acts[:, :3].any()
    tokens.stored_inputs = [x[:1], x[1:]]
    figures, again = language_model_figures(sae, hooked_model, tokens, cfg)
    assert torch.equal(again, fired)
    assert figures["dead_latents"] == int((~(fired | acts.any(0))).sum())
    assert figures["dead_window"] == before["evaluated_samples"] + 2


def test_the_count_of_dead_latents_can_be_stopped(sae, cfg, tokens, hooked_model):
    read = []
    tokens.stored_inputs = (read.append(i) or torch.randn(4, 16) for i in range(3))

    def on_batch(done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        language_model_figures(sae, hooked_model, tokens, cfg, on_batch)
    assert read == [0]


def test_the_hierarchy_score_is_that_of_all_counted_tokens(sae, cfg, hooked_model, monkeypatch):
    monkeypatch.setattr(language_model, "FEWEST_SAMPLES", 100)
    batches = [torch.randint(4, 64, (30, CONTEXT)) for _ in range(2)]
    cfg.exclude_special_tokens = [7]
    tokens = HeldOutTokens(batches, CONTEXT, 30)
    figures, _ = language_model_figures(sae, hooked_model, tokens, cfg)
    every = torch.cat(batches)
    with torch.no_grad():
        _, cache = hooked_model.run_with_cache(every, names_filter=[HOOK], prepend_bos=False)
        x = cache[HOOK][every != 7]
        score = HierarchyScore(sae.W_dec)
        score.update(x, sae.encode(x))
    assert score.pairs()
    assert figures["hierarchy_score"] == pytest.approx(score.compute())


def test_excluded_tokens_are_not_counted(sae, cfg, tokens, hooked_model):
    every = torch.cat(tokens.batches)
    cfg.exclude_special_tokens = [0, int(every[0, 1])]
    figures, _ = language_model_figures(sae, hooked_model, tokens, cfg)
    excluded = int((every == 0).sum() + (every == every[0, 1]).sum())
    assert figures["evaluated_samples"] == every.numel() - excluded


def test_the_same_tokens_serve_every_sae(sae, cfg, tokens, hooked_model):
    a, _ = language_model_figures(sae, hooked_model, tokens, cfg)
    tokens.get_batch_tokens()
    b, _ = language_model_figures(sae, hooked_model, tokens, cfg)
    assert a == pytest.approx(b, nan_ok=True)


def test_a_hook_that_the_model_does_not_need(sae, cfg, tokens, hooked_model, monkeypatch):
    """SAELens then divides by zero in the recovered loss."""
    for parameter in hooked_model.parameters():
        monkeypatch.setattr(parameter, "data", torch.zeros_like(parameter))
    figures, _ = language_model_figures(sae, hooked_model, tokens, cfg)
    assert "ce_loss_score" not in figures
    assert "explained_variance" in figures
