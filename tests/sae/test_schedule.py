"""What is in force when: masks, c, and the pressure on children."""

import pytest
import torch

from tests.helpers import make_sae, state_equal, step_input, train
from tests.sae.test_atm_sae import every_activation, every_schedule, with_importance

HALF = torch.cat([torch.zeros(12), torch.ones(12)])


def test_masking_ends():
    sae = with_importance(make_sae(schedule_steps=2000, mask_end=0.6, mask_rate=20.0), HALF)
    sae.tracker.steps.fill_(1199)
    assert not sae.draw_mask(1).keep.all()
    sae.tracker.steps.fill_(1200)
    assert sae.draw_mask(1).keep.all()


def test_a_mask_end_of_1_is_no_end():
    sae = with_importance(make_sae(schedule_steps=10, mask_end=1.0, mask_rate=20.0), HALF)
    sae.tracker.steps.fill_(10_000)
    assert not sae.draw_mask(1).keep.all()


def test_c_is_drawn_evenly_between_its_ends():
    sae = with_importance(make_sae(c_course="uniform", c_start=-1.0, c_end=3.0), HALF)
    drawn = []
    for step in range(2000):
        sae.tracker.steps.fill_(step)
        drawn.append(sae.c.item())
    assert min(drawn) >= -1
    assert max(drawn) < 3
    for q in (0.25, 0.5, 0.75):
        assert torch.tensor(drawn).quantile(q).item() == pytest.approx(4 * q - 1, abs=0.15)


@pytest.mark.parametrize("mask_granularity", ["step", "sample"])
def test_coherent_masks_fall_in_the_order_of_importance(mask_granularity):
    importance = torch.linspace(0, 2, 24)
    sae = make_sae(mask_draw="coherent", mask_granularity=mask_granularity, c_start=3.0, c_end=3.0)
    with_importance(sae, importance)
    sizes = set()
    for step in range(100, 150):
        sae.tracker.steps.fill_(step)
        for keep in sae.draw_mask(4).keep.reshape(-1, 24):
            assert (keep[1:] >= keep[:-1]).all()  # once kept, all above are
            sizes.add(int(keep.sum()))
    assert len(sizes) > 5


@every_activation
@every_schedule
def test_pressure_begins_at_its_step(activation, schedule):
    fields = {"activation": activation, "schedule": schedule, "l1_coefficient": 0.0}
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
    """Inputs of a parent (dimension 0) that fires half of the time, and of a child of it
    (dimension 1) that fires in a fourth of that."""
    draw = torch.rand(samples, 8) < 0.5
    parent = draw[:, 0].float()
    x = torch.zeros(samples, 8)
    x[:, 0], x[:, 1] = parent, parent * draw[:, 1] * draw[:, 2]
    return x


def absorbing_sae(**fields):
    """Two latents: the parent's, all but blind to inputs with the child; the child's, which carries
    both."""
    sae = make_sae(d_sae=2, k=0.7, mask_end=0.0, parent_start=0.0, **fields)
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.W_enc.zero_()
        sae.W_dec[0, 0] = 1.0
        sae.W_dec[1, :2] = 0.5**0.5
        sae.W_enc[0, 0], sae.W_enc[1, 0] = 1.0, -0.95
        sae.W_enc[1, 1] = 2**0.5
    return sae


def test_the_pressure_parts_a_child_from_its_parent():
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


def test_parents_looked_for_in_turn_are_all_found():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    losses = {}
    for rows in (6, 24, 2048):
        torch.manual_seed(1)
        sae = make_sae(parent_rows=rows, parent_tau=0.01, importance_decay=0.0, parent_start=0.0)
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


def test_masks_that_hide_nothing_are_not_paid_for():
    x = torch.randn(64, 8)
    sae = make_sae(schedule_steps=10, mask_end=0.5)
    for step in range(8):
        losses = sae.training_forward_pass(step_input(x, step=step)).losses
        assert ("masked_mse_loss" in losses) == (2 <= step < 5)
    unmasked = make_sae(mask_rate=0.0, mask_warm_up_steps=0)
    assert "masked_mse_loss" not in unmasked.training_forward_pass(step_input(x)).losses


def test_a_schedule_cut_short_is_told(tmp_path):
    sae = train(make_sae(schedule_steps=100), 20)
    with pytest.warns(UserWarning, match="20 of the 100 steps of its schedule"):
        sae.save_inference_model(tmp_path)


def test_dead_latents_are_revived_by_activations_not_by_their_negatives():
    """The auxiliary loss against brute force: the residual by what dead latents would add."""
    sae = make_sae(mask_rate=0.0, parent_weight=0.0, d_sae=8, k=2)
    x = torch.randn(64, 8)
    dead = torch.zeros(8, dtype=torch.bool)
    dead[[1, 4, 6]] = True
    output = sae.training_forward_pass(step_input(x, dead))
    with torch.no_grad():
        hidden = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        norm = sae.W_dec.norm(dim=1)
        explained = (hidden * norm).relu()[:, dead] @ (sae.W_dec / norm[:, None])[dead]
        # 3 dead latents of the 4 that SAELens would use: three quarters of the weight
        expected = 0.75 * (explained - (x - output.sae_out)).square().sum(1).mean()
    found = output.losses["auxiliary_reconstruction_loss"]
    torch.testing.assert_close(found, expected)


def test_dual_revives_dead_latents_at_full_weight():
    sae = with_importance(make_sae(mask_rate=20.0, parent_weight=0.0, masked_weight=0.25), HALF)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[3:9] = True
    output = sae.training_forward_pass(step_input(torch.randn(64, 8), dead))
    losses = output.losses
    full, masked = losses["mse_loss"], losses["masked_mse_loss"]
    revival = losses["auxiliary_reconstruction_loss"]
    assert revival > 0
    torch.testing.assert_close(output.loss, 0.75 * full + 0.25 * masked + revival)


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
