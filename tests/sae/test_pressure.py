"""The pressure on children in an SAE's training."""

import pytest
import torch

from tests.helpers import make_sae, state_equal, step_input, train
from tests.sae.test_atm_sae import every_activation


@every_activation
def test_pressure_begins_at_its_step(activation):
    fields = {"activation": activation, "l1_coefficient": 0.0}
    sae = make_sae(schedule_steps=40, parent_start=0.5, **fields)
    x = torch.randn(64, 8)
    for step in range(22):
        losses = sae.training_forward_pass(step_input(x, step=step)).losses
        assert ("parent_loss" in losses) == (step >= 20)


def test_no_pressure_without_weight():
    sae = train(make_sae(parent_weight=0.0, parent_start=0.0), 5)
    assert sae.parent_tracker is None
    assert "parent_loss" not in sae.training_forward_pass(step_input(torch.randn(8, 8))).losses


def family(samples=512):
    """Inputs with a parent (dimension 0) in half of the samples, and its child (dimension 1) in a
    fourth of those."""
    draw = torch.rand(samples, 8) < 0.5
    parent = draw[:, 0].float()
    x = torch.zeros(samples, 8)
    x[:, 0], x[:, 1] = parent, parent * draw[:, 1] * draw[:, 2]
    return x


def absorbing_sae(**fields):
    """An SAE of two latents. The parent's fires without the child, the child's carries both."""
    sae = make_sae(d_sae=2, k=0.7, mask_end=0.0, parent_start=0.0, **fields)
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.W_enc.zero_()
        sae.W_dec[0, 0] = 1.0
        sae.W_dec[1, :2] = 0.5**0.5
        sae.W_enc[0, 0], sae.W_enc[1, 0] = 1.0, -0.95
        sae.W_enc[1, 1] = 2**0.5
    return sae


def test_the_pressure_turns_a_child_away_from_its_parent():
    torch.manual_seed(0)
    alone, pressed = absorbing_sae(parent_weight=0.0), absorbing_sae(parent_weight=3.0)
    for sae in (alone, pressed):
        train(sae, 400, data=lambda _: family())
    for sae, low, high in ((alone, 0.6, 0.8), (pressed, -0.1, 0.1)):
        cosine = torch.cosine_similarity(sae.W_dec[0], sae.W_dec[1], dim=0).item()
        assert low < cosine < high
    # and the parent fires beside its child again
    both = torch.zeros(1, 8)
    both[0, :2] = 1.0
    assert alone.eval().encode(both)[0, 0] < 0.1
    assert pressed.eval().encode(both)[0, 0] > 0.8


def test_parents_searched_in_turn_are_all_found():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    losses = {}
    for rows in (6, 24, 2048):
        torch.manual_seed(1)
        rule = {"parent_tau": 0.01, "parent_chance": 0.0}
        sae = make_sae(parent_rows=rows, importance_decay=0.0, parent_start=0.0, **rule)
        sae.training_forward_pass(step_input(x))
        found = [
            sae.training_forward_pass(step_input(x)).losses["parent_loss"].item() for _ in range(8)
        ]
        losses[rows] = found
    assert losses[24][0] > 0
    assert losses[24] == pytest.approx(losses[2048], rel=1e-6)
    # More are found in each of the steps of a round; the second round has every latent's own lift.
    assert losses[6] == sorted(losses[6])
    assert losses[6][0] < losses[6][7] == pytest.approx(losses[24][7], rel=1e-4)


@every_activation
def test_pressure_in_bfloat16_and_float64(activation):
    for dtype in ("bfloat16", "float64"):
        sae = train(make_sae(activation=activation, dtype=dtype, parent_start=0.0), 5)
        assert all(p.isfinite().all() for p in sae.parameters())


def test_the_averages_survive_a_checkpoint():
    torch.manual_seed(0)
    sae = train(make_sae(), 20)
    state = sae.state_dict()
    assert state["parent_tracker.inputs"].any()
    other = make_sae()
    other.process_state_dict_for_loading(state)
    other.load_state_dict(state)
    assert state_equal(sae.state_dict(), other.state_dict())
