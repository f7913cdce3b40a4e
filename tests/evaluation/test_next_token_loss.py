import pytest
import torch
from torch.nn import functional

from sae_lens_atm.evaluation import next_token_loss
from sae_lens_atm.evaluation.next_token_loss import (
    NO_TARGET,
    Unembedding,
    losses,
    original_predictions,
)

VOCABULARY, WIDTH, POSITIONS = 50, 8, 13


@pytest.fixture
def hidden():
    return 3 * torch.randn(POSITIONS, WIDTH), 3 * torch.randn(POSITIONS, WIDTH)


@pytest.fixture
def targets():
    targets = torch.randint(0, VOCABULARY, (POSITIONS,))
    targets[[3, 12]] = NO_TARGET
    return targets


def unembedding(bias=False, softcap=None, dtype=torch.float32):
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype)
    return Unembedding(weight, torch.randn(VOCABULARY, dtype=dtype) if bias else None, softcap)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_losses_are_those_of_all_logits(hidden, targets, bias, softcap, monkeypatch):
    monkeypatch.setattr(next_token_loss, "LOGITS", 4 * VOCABULARY)  # four positions at a time
    last = unembedding(bias, softcap)
    assert last.is_linear == (softcap is None)
    p, q = (last.logits(states).log_softmax(-1) for states in hidden)
    original, before = original_predictions(last, hidden[0], targets)
    found = losses(last, hidden[1], targets, original)
    expected = (functional.cross_entropy(x, targets, reduction="sum").item() for x in (p, q))
    assert before == pytest.approx(next(expected), rel=1e-5)
    assert found.cross_entropy == pytest.approx(next(expected), rel=1e-5)
    kl = (p.exp() * (p - q)).sum().item()
    assert found.kl == pytest.approx(kl, rel=1e-4)


def test_the_softcap_bounds_the_logits(hidden):
    logits = unembedding(softcap=5.0).logits(100 * hidden[0])
    assert logits.abs().max() <= 5
    assert logits.abs().max() > 4.9


def test_equal_predictions_do_not_diverge(hidden, targets):
    last = unembedding(bias=True)
    original, before = original_predictions(last, hidden[0], targets)
    found = losses(last, hidden[0], targets, original)
    assert found.kl == pytest.approx(0, abs=1e-4)
    assert found.cross_entropy == before


def test_a_model_in_bfloat16_is_not_taken_for_linear(hidden, targets):
    """Rounded probabilities would give the divergence an error as large as itself."""
    last = unembedding(dtype=torch.bfloat16)
    assert not last.is_linear
    states = [h.to(torch.bfloat16) for h in hidden]
    p, q = (last.logits(h).log_softmax(-1) for h in states)
    assert p.dtype == torch.float32
    original, _ = original_predictions(last, states[0], targets)
    kl = losses(last, states[1], targets, original).kl
    assert kl == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-4)
