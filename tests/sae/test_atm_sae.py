import copy
import math
import pickle

import pytest
import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_atm import ATMTrainingSAE, importance_threshold, mask_probability
from tests.helpers import (
    ACTIVATIONS,
    GRANULARITIES,
    SCHEDULES,
    make_sae,
    state_equal,
    step_input,
    train,
)

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
every_granularity = pytest.mark.parametrize("mask_granularity", GRANULARITIES)


def with_importance(sae, values):
    """Give the latents these importances, and the clock enough steps to mask."""
    for signal in ("magnitude", "frequency", "contribution"):
        sae.tracker.get_buffer(signal).copy_(values)
    sae.tracker.weight.fill_(1.0)
    sae.tracker.steps.fill_(1000)
    return sae


@every_activation
@every_schedule
@every_granularity
def test_training_reduces_the_error_and_is_finite(activation, schedule, mask_granularity):
    directions = torch.nn.functional.normalize(torch.randn(12, 8), dim=1)

    def data(_):
        return ((torch.rand(128, 12) < 0.15) * torch.rand(128, 12)) @ directions

    sae = make_sae(
        activation=activation,
        schedule=schedule,
        mask_granularity=mask_granularity,
        l1_coefficient=0.1,
        l0_coefficient=0.1,
    )
    x = data(0)
    sae.eval()
    before = (sae(x) - x).square().sum()
    train(sae, 300, data=data)
    sae.eval()
    after = (sae(x) - x).square().sum()
    assert all(p.isfinite().all() for p in sae.parameters())
    assert after < 0.6 * before
    assert sae.tracker.steps.item() == 300


def test_the_mask_follows_the_formulas():
    sae = with_importance(
        make_sae(d_sae=6, c_start=0.5, c_end=0.5, mask_rate=2.0), torch.tensor([0, 1, 2, 3, 4, 8.0])
    )
    mask = sae.draw_mask(4)
    # the mean of three equal signals, each divided by its mean of 3
    torch.testing.assert_close(mask.importance, torch.tensor([0, 1, 2, 3, 4, 8.0]) / 3)
    theta = importance_threshold(mask.importance, 0.5)
    torch.testing.assert_close(mask.threshold, theta)
    torch.testing.assert_close(mask.probability, mask_probability(mask.importance, theta, 2.0))
    assert mask.keep[-1]


def test_masks_are_drawn_with_their_probability():
    sae = with_importance(make_sae(d_sae=4, c_end=0.0), torch.tensor([0.0, 0.5, 1.0, 6.0]))
    kept = torch.zeros(4)
    for step in range(2000):
        sae.tracker.steps.fill_(100 + step)
        kept += sae.draw_mask(1).keep
    p = sae.draw_mask(1).probability
    torch.testing.assert_close(kept / 2000, 1 - p, atol=0.05, rtol=0)


def test_warm_up_and_ramps():
    sae = make_sae(
        mask_warm_up_steps=5, mask_ramp_steps=4, c_start=-1.0, c_end=1.0, schedule_steps=8, d_sae=3
    )
    with_importance(sae, torch.tensor([0.1, 1.0, 3.0]))

    def at(step):
        sae.tracker.steps.fill_(step)
        return sae.draw_mask(1)

    assert [at(step).c.item() for step in (0, 4, 8, 100)] == [-1, 0, 1, 1]
    assert not at(5).probability.any()
    full = mask_probability(at(7).importance, at(7).threshold, 1.0)
    torch.testing.assert_close(at(7).probability, 0.5 * full)


@every_granularity
def test_no_history_masks_nothing(mask_granularity):
    sae = make_sae(mask_warm_up_steps=0, mask_granularity=mask_granularity)
    assert sae.draw_mask(5).keep.all()


@every_activation
@every_granularity
def test_a_masked_latent_has_no_gradient(activation, mask_granularity):
    sae = with_importance(
        make_sae(
            activation=activation,
            schedule="masked",
            mask_granularity=mask_granularity,
            mask_rate=20.0,
            jumprelu_bandwidth=2.0,
            pre_act_loss_coefficient=1.0,
        ),
        torch.cat([torch.zeros(12), torch.ones(12)]),
    )
    # the unimportant half is masked with probability 1 - exp(-20)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[:3] = True
    x = torch.randn(64, 8)
    keep = sae.draw_mask(64).keep.expand(64, 24)
    assert not keep[:, :12].any()
    assert keep[:, 12:].all()
    sae.training_forward_pass(step_input(x, dead)).loss.backward()
    assert not sae.W_enc.grad[:, :12].any()
    assert not sae.W_dec.grad[:12].any()
    assert not sae.b_enc.grad[:12].any()
    assert sae.W_dec.grad[12:].any()
    if activation == "jumprelu":
        assert not sae.threshold.grad[:12].any()


@every_activation
@every_schedule
def test_feature_acts_are_those_of_the_view_that_was_computed(activation, schedule):
    sae = with_importance(
        make_sae(activation=activation, schedule=schedule, mask_rate=20.0, masked_probability=1.0),
        torch.cat([torch.zeros(12), torch.ones(12)]),
    )
    x = torch.randn(256, 8)
    acts, hidden_pre = sae.encode_with_hidden_pre(x)
    assert acts[:, :12].any()
    if schedule != "dual":
        acts, _ = sae.mask_acts(acts, hidden_pre, torch.arange(24) >= 12)
    found = sae.training_forward_pass(step_input(x)).feature_acts.to_dense()
    torch.testing.assert_close(found, acts)


@every_activation
@pytest.mark.parametrize("schedule", ["interleaved", "masked"])
def test_a_latent_that_is_kept_now_and_then_is_not_called_dead(activation, schedule):
    """A masked latent is not computed, so not seen to fire; in some steps of the window it is."""
    sae = make_sae(activation=activation, schedule=schedule, mask_warm_up_steps=0, c_start=1.0)
    cfg = SAETrainerConfig(
        total_training_samples=64 * 60,
        train_batch_size_samples=64,
        lr=0.0,
        lr_end=0,
        dead_feature_window=20,
    )
    trainer = SAETrainer(cfg, sae, iter(torch.randn(60, 64, 8)))
    sae.b_enc.data[:2] = -1e3
    masked = 0
    for _ in range(60):
        masked += int((~sae.draw_mask(64).keep[2:]).sum())
        trainer.step(next(trainer.data_provider))
    assert masked > 50
    assert trainer.dead_neurons[:2].all()
    assert not trainer.dead_neurons[2:].any()


@every_activation
def test_masked_latents_keep_their_averages(activation):
    sae = with_importance(
        make_sae(activation=activation, schedule="masked", mask_rate=60.0),
        torch.cat([torch.full((12,), 0.1), torch.ones(12)]),
    )
    before = sae.tracker.averages().magnitude.clone()
    sae.training_forward_pass(step_input(torch.randn(64, 8)))
    after = sae.tracker.averages().magnitude
    assert torch.equal(after[:12], before[:12])
    assert (after[12:] != before[12:]).all()


@every_activation
def test_dual_measures_the_full_view(activation):
    sae = with_importance(
        make_sae(activation=activation, mask_rate=20.0, importance_decay=0.0),
        torch.cat([torch.zeros(12), torch.ones(12)]),
    )
    x = torch.randn(256, 8)
    acts = sae.training_forward_pass(step_input(x)).feature_acts.to_dense()
    frequency = (acts > 0).float().mean(0)
    assert frequency[:12].any()
    torch.testing.assert_close(sae.tracker.averages().frequency, frequency)


@every_activation
def test_per_sample_masks_measure_each_latent_where_it_was_kept(activation):
    sae = with_importance(
        make_sae(
            activation=activation,
            schedule="masked",
            mask_granularity="sample",
            importance_decay=0.0,
        ),
        torch.linspace(0, 1, 24),
    )
    x = torch.randn(256, 8)
    keep = sae.draw_mask(256).keep
    acts, _ = sae.mask_acts(*sae.encode_with_hidden_pre(x), keep)
    sae.training_forward_pass(step_input(x))
    for i in range(24):
        expected = (acts[keep[:, i], i] > 0).float().mean()
        torch.testing.assert_close(sae.tracker.averages().frequency[i], expected)


@every_activation
@every_schedule
def test_masking_off_is_the_plain_architecture(activation, schedule):
    """With r = 0 every schedule minimises what SAELens' own class minimises."""
    sae = make_sae(activation=activation, schedule=schedule, mask_rate=0.0)
    x = torch.randn(64, 8)
    output = sae.training_forward_pass(step_input(x))
    acts, hidden_pre = sae.encode_with_hidden_pre(x)
    sae_out = sae.decode(acts)
    expected = (sae_out - x).square().sum(-1).mean()
    torch.testing.assert_close(output.losses["mse_loss"], expected)
    for loss in sae.calculate_aux_loss(step_input(x), acts, hidden_pre, sae_out).values():
        expected = expected + loss
    torch.testing.assert_close(output.loss, expected)


def test_masking_off_trains_exactly_as_batchtopk():
    atm = make_sae(mask_rate=0.0, parent_weight=0.0)
    plain = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=8, d_sae=24, k=3))
    plain.load_state_dict({n: p.clone() for n, p in atm.state_dict().items() if "tracker" not in n})
    batches = torch.randn(20, 64, 8)
    for sae in (atm, plain):
        train(sae, 20, data=lambda step: batches[step])
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(atm.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(atm.topk_threshold, plain.topk_threshold, rtol=1e-5, atol=1e-7)


def test_dual_weighs_the_two_views():
    x = torch.randn(64, 8)
    sae = make_sae(mask_rate=20.0, activation="relu", parent_weight=0.0)
    losses = {}
    for weight in (0.0, 0.3, 1.0):
        with_importance(sae, torch.cat([torch.zeros(12), torch.ones(12)]))
        sae.cfg.masked_weight = weight
        losses[weight] = sae.training_forward_pass(step_input(x)).loss
    torch.testing.assert_close(losses[0.3], 0.7 * losses[0.0] + 0.3 * losses[1.0])
    assert losses[1.0] > losses[0.0]


def test_the_masked_view_of_batchtopk_chooses_its_k_again():
    sae = with_importance(
        make_sae(schedule="masked", mask_rate=20.0, k=3),
        torch.cat([torch.zeros(12), torch.ones(12)]),
    )
    x = torch.randn(256, 8)
    acts, hidden_pre = sae.encode_with_hidden_pre(x)
    masked, _ = sae.mask_acts(acts, hidden_pre, sae.draw_mask(256).keep)
    assert (acts > 0).sum() == (masked > 0).sum() == 3 * 256
    assert not masked[:, :12].any()


def test_interleaved_steps_are_full_or_masked_by_the_coin():
    sae = with_importance(
        make_sae(schedule="interleaved", masked_probability=0.3, mask_rate=20.0),
        torch.cat([torch.zeros(12), torch.ones(12)]),
    )
    masked = []
    for step in range(1000):
        sae.tracker.steps.fill_(100 + step)
        masked.append(not sae.draw_mask(1).keep.all())
    assert sum(masked) / 1000 == pytest.approx(0.3, abs=0.06)


def test_the_coin_and_the_masks_are_drawn_apart():
    sae = with_importance(
        make_sae(schedule="interleaved", masked_probability=0.5, c_end=0.0, mask_rate=1.0),
        torch.cat([torch.zeros(12), torch.ones(12)]),
    )
    kept = []
    for step in range(3000):
        sae.tracker.steps.fill_(100 + step)
        mask = sae.draw_mask(1)
        if mask.probability.any():
            kept.append(mask.keep[:12])
    expected = torch.full((12,), math.exp(-1))
    torch.testing.assert_close(torch.stack(kept).float().mean(0), expected, atol=0.07, rtol=0)


def test_jumprelu_thresholds_are_kept_from_going_negative():
    sae = make_sae(activation="jumprelu")
    sae.threshold.data.fill_(-0.5)
    acts = sae.training_forward_pass(step_input(torch.randn(64, 8))).feature_acts
    assert (acts >= 0).all()
    assert (sae.threshold == 0).all()


@every_activation
def test_eval_mode_masks_nothing_updates_nothing_and_ignores_the_batch(activation):
    sae = train(make_sae(activation=activation, dtype="float64"), 30).eval()
    before = copy.deepcopy(sae.state_dict())
    x = torch.randn(64, 8, dtype=torch.float64)
    together = sae.encode(x)
    alone = torch.cat([sae.encode(row.unsqueeze(0)) for row in x])
    torch.testing.assert_close(alone, together, rtol=1e-10, atol=1e-12)
    sae(x)
    assert state_equal(before, sae.state_dict())


@every_activation
def test_hooks_see_eval_activations(activation):
    sae = train(make_sae(activation=activation), 5).eval()
    x = torch.randn(4, 8)
    _, cache = sae.run_with_cache(x)
    assert torch.equal(cache["hook_sae_acts_post"], sae.encode(x))


@every_activation
@every_schedule
@every_granularity
def test_two_runs_with_one_seed_are_equal(activation, schedule, mask_granularity):
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        sae = make_sae(activation=activation, schedule=schedule, mask_granularity=mask_granularity)
        states.append(train(sae, 20).state_dict())
    assert state_equal(*states)


def test_the_mask_seed_changes_the_masks_and_nothing_else_does():
    importance = torch.linspace(0, 1, 24)
    a, b, c = (with_importance(make_sae(mask_seed=seed), importance) for seed in (1, 1, 2))
    torch.manual_seed(1)
    assert torch.equal(a.draw_mask(1).keep, b.draw_mask(1).keep)
    assert not torch.equal(a.draw_mask(1).keep, c.draw_mask(1).keep)


def test_metrics_are_lazy_and_of_this_step():
    sae = with_importance(make_sae(mask_rate=20.0), torch.cat([torch.zeros(12), torch.ones(12)]))
    dead = torch.zeros(24, dtype=torch.bool)
    dead[:2] = True
    metrics = sae.training_forward_pass(step_input(torch.randn(16, 8), dead)).metrics

    def value(name):
        metric = metrics[name]
        return float(metric() if callable(metric) else metric)

    assert value("masked_fraction") == 0.5
    assert value("mask_probability") == pytest.approx(0.5, abs=1e-4)
    assert value("importance_mean") == pytest.approx(1)
    assert value("importance_q50") == pytest.approx(1, abs=1e-5)
    assert value("mask_c") == 1
    assert value("importance_threshold") == pytest.approx(2)
    assert value("alive_latents") == 22
    assert callable(metrics["masked_fraction"])


def test_logged_reconstruction_is_of_the_sae_that_will_be_saved():
    sae = with_importance(
        make_sae(schedule="masked", mask_rate=20.0), torch.cat([torch.zeros(12), torch.ones(12)])
    )
    x = torch.randn(64, 8)
    acts, _ = sae.encode_with_hidden_pre(x)
    output = sae.training_forward_pass(step_input(x, logging=True))
    torch.testing.assert_close(output.sae_out, sae.decode(acts))


def test_histograms_hold_the_importance():
    sae = train(make_sae(), 5)
    histograms = sae.log_histograms()
    assert histograms["weights/importance"].tolist() == sae.importance.tolist()
    assert "weights/W_dec_norms" in histograms


def test_batch_of_one_and_single_latent():
    sae = make_sae(d_sae=1, k=1)
    output = sae.training_forward_pass(step_input(torch.randn(1, 8)))
    assert output.loss.isfinite()
    assert sae.draw_mask(1).keep.tolist() == [True]


@every_activation
def test_dead_latents_get_an_auxiliary_loss_from_the_full_view_alone(activation):
    sae = make_sae(activation=activation, pre_act_loss_coefficient=1.0)
    dead = torch.ones(24, dtype=torch.bool)
    losses = sae.training_forward_pass(step_input(torch.randn(64, 8), dead)).losses
    name = {"batchtopk": "auxiliary_reconstruction_loss", "jumprelu": "pre_act_loss"}.get(
        activation
    )
    if name is not None:
        assert losses[name] > 0
        assert losses.get(f"masked_{name}", torch.tensor(0.0)) == 0


@every_activation
def test_copies_and_pickles(activation):
    sae = train(make_sae(activation=activation), 3)
    for other in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae.state_dict()))):
        state = other.state_dict() if isinstance(other, TrainingSAE) else other
        assert state_equal(state, sae.state_dict())
    assert type(copy.deepcopy(sae)) is type(sae)


@every_activation
def test_one_class_to_its_users(activation):
    cfg = make_sae(activation=activation).cfg
    assert isinstance(ATMTrainingSAE(cfg), ATMTrainingSAE)
    assert isinstance(ATMTrainingSAE(cfg=cfg), ATMTrainingSAE)


def test_pulling_a_parent_and_child_apart():
    """The mechanism itself: beside an absorbing child, masking gives the parent its gradient back.

    The child's latent holds parent and child together, so on samples with the child the parent's
    latent is idle. Where the child's latent is masked, the loss asks the parent's latent to fire.
    """
    sae = make_sae(d_in=2, d_sae=2, activation="relu", l1_coefficient=0.0, schedule="masked")
    sae.W_enc.data = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])  # parent: fires without the child
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    sae.b_enc.data.zero_()
    with_child = torch.tensor([[1.0, 1.0]])
    acts, _ = sae.encode_with_hidden_pre(with_child)
    assert acts.tolist() == [[0.0, 1.0]]
    assert torch.equal(sae.decode(acts), with_child)
    sae.b_enc.data[0] = 1e-3  # just above silence, where a gradient can reach
    gradients = []
    for importance in ([1.0, 1.0], [1.0, 0.0]):
        with_importance(sae, torch.tensor(importance))
        sae.cfg.mask_rate = 40.0
        sae.zero_grad()
        sae.training_forward_pass(step_input(with_child)).loss.backward()
        gradients.append(sae.b_enc.grad[0].item())
    assert gradients[0] >= 0  # full: the parent is pushed to stay silent
    assert gradients[1] < -1  # child masked: it is asked to speak
