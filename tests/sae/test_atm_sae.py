import copy
import math
import pickle

import pytest
import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_atm import ATMTrainingSAE, importance_threshold, mask_probability
from sae_lens_atm.method.step_context import StepContext
from tests.helpers import ACTIVATIONS, PRESETS, make_sae, state_equal, step_input, train

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_preset = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
HALF = torch.cat([torch.zeros(12), torch.ones(12)])


def with_importance(sae, values):
    """Give the latents these importances, and the clock enough steps to mask."""
    for signal in ("magnitude", "frequency", "contribution"):
        sae.tracker.get_buffer(signal).copy_(values)
    sae.tracker.weight.fill_(1.0)
    sae.tracker.steps.fill_(1000)
    return sae


def test_the_mask_follows_the_formulas():
    sae = with_importance(
        make_sae(d_sae=6, c_start=0.5, c_end=0.5, mask_rate=2.0), torch.tensor([0, 1, 2, 3, 4, 8.0])
    )
    mask = sae.draw_mask()
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
        kept += sae.draw_mask().keep
    p = sae.draw_mask().probability
    torch.testing.assert_close(kept / 2000, 1 - p, atol=0.05, rtol=0)


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
@pytest.mark.parametrize("dead", [False, True])
def test_a_batch_of_sequences_is_trained_on_as_its_rows(activation, dead):
    """SAELens' own training SAEs accept it, too."""
    x, sae = torch.randn(4, 8, 8), make_sae(activation=activation, mask_warm_up_steps=0)
    sae.tracker.steps.fill_(50)
    mask = torch.arange(24) > 20 if dead else None
    rows = copy.deepcopy(sae)
    outputs = [
        module.training_forward_pass(step_input(batch, mask))
        for module, batch in ((sae, x), (rows, x.flatten(0, 1)))
    ]
    assert outputs[0].feature_acts.shape == (4, 8, 24)
    for name, loss in outputs[0].losses.items():
        torch.testing.assert_close(loss, outputs[1].losses[name])
    for name, buffer in sae.named_buffers():
        torch.testing.assert_close(buffer, rows.get_buffer(name))


@every_activation
def test_hooks_see_eval_activations(activation):
    sae = train(make_sae(activation=activation), 5).eval()
    x = torch.randn(4, 8)
    _, cache = sae.run_with_cache(x)
    assert torch.equal(cache["hook_sae_acts_post"], sae.encode(x))


def test_the_mask_seed_changes_the_masks_and_nothing_else_does():
    importance = torch.linspace(0, 1, 24)
    a, b, c = (with_importance(make_sae(mask_seed=seed), importance) for seed in (1, 1, 2))
    torch.manual_seed(1)
    assert torch.equal(a.draw_mask().keep, b.draw_mask().keep)
    assert not torch.equal(a.draw_mask().keep, c.draw_mask().keep)


def test_metrics_are_lazy_and_of_this_step():
    sae = with_importance(make_sae(mask_rate=20.0), HALF)
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


def test_histograms_hold_the_importance():
    sae = train(make_sae(), 5)
    histograms = sae.log_histograms()
    assert histograms["weights/importance"].tolist() == sae.importance.tolist()
    assert "weights/W_dec_norms" in histograms


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


# --- masks and their schedule --------------------------------------------------------------------


def mask_at(sae, step):
    sae.tracker.steps.fill_(step)
    return sae.draw_mask()


def test_c_goes_linearly_from_start_to_end():
    sae = make_sae(c_start=-1.0, c_end=1.0, schedule_steps=8, d_sae=3)
    assert [mask_at(sae, step).c.item() for step in (0, 4, 8, 100)] == [-1, 0, 1, 1]


def test_masks_begin_after_the_warm_up_and_end_at_mask_end():
    sae = with_importance(
        make_sae(mask_warm_up_steps=5, schedule_steps=2000, mask_end=0.6, mask_rate=20.0), HALF
    )
    all_kept = {step: bool(mask_at(sae, step).keep.all()) for step in (4, 5, 1199, 1200)}
    assert all_kept == {4: True, 5: False, 1199: False, 1200: True}


def test_masks_do_not_end_at_a_mask_end_of_1():
    sae = with_importance(make_sae(schedule_steps=10, mask_end=1.0, mask_rate=20.0), HALF)
    assert not mask_at(sae, 10_000).keep.all()


def test_latents_without_history_are_not_masked():
    assert make_sae(mask_warm_up_steps=0).draw_mask().keep.all()


def test_the_masked_pass_is_computed_only_while_masks_are_active():
    x = torch.randn(64, 8)
    sae = make_sae(schedule_steps=10, mask_end=0.5)
    for step in range(8):
        losses = sae.training_forward_pass(step_input(x, step=step)).losses
        assert ("masked_mse_loss" in losses) == (2 <= step < 5)
    unmasked = make_sae(mask_rate=0.0, mask_warm_up_steps=0)
    assert "masked_mse_loss" not in unmasked.training_forward_pass(step_input(x)).losses


# --- the loss of a step --------------------------------------------------------------------------


@every_preset
def test_training_reduces_the_error(preset):
    directions = torch.nn.functional.normalize(torch.randn(12, 8), dim=1)

    def data(_):
        return ((torch.rand(128, 12) < 0.15) * torch.rand(128, 12)) @ directions

    sae = make_sae(**preset, l1_coefficient=0.1).eval()
    x = data(0)
    before = (sae(x) - x).square().sum()
    train(sae, 200, data=data).eval()
    assert all(p.isfinite().all() for p in sae.parameters())
    assert (sae(x) - x).square().sum() < 0.6 * before
    assert sae.tracker.steps.item() == 200


@every_activation
def test_without_masks_the_loss_is_that_of_saelens(activation):
    sae = make_sae(activation=activation, mask_rate=0.0, parent_weight=0.0)
    x = torch.randn(64, 8)
    output = sae.training_forward_pass(step_input(x))
    acts, hidden_pre = sae.encode_with_hidden_pre(x)
    sae_out = sae.decode(acts)
    expected = (sae_out - x).square().sum(-1).mean()
    torch.testing.assert_close(output.losses["mse_loss"], expected)
    for loss in sae.calculate_aux_loss(step_input(x), acts, hidden_pre, sae_out).values():
        expected = expected + loss
    torch.testing.assert_close(output.loss, expected)


def test_the_weight_mixes_the_two_losses():
    x = torch.randn(64, 8)
    sae = make_sae(mask_rate=20.0, activation="relu", parent_weight=0.0)
    losses = {}
    for weight in (0.0, 0.3, 1.0):
        with_importance(sae, HALF)
        sae.cfg.masked_weight = weight
        losses[weight] = sae.training_forward_pass(step_input(x)).loss
    torch.testing.assert_close(losses[0.3], 0.7 * losses[0.0] + 0.3 * losses[1.0])
    assert losses[1.0] > losses[0.0]


def test_a_weight_of_zero_makes_no_masked_pass():
    sae = with_importance(make_sae(mask_rate=20.0, masked_weight=0.0), HALF)
    losses = sae.training_forward_pass(step_input(torch.randn(64, 8))).losses
    assert not any(name.startswith("masked_") for name in losses)


def test_dead_latents_are_revived_by_the_full_pass_alone_at_full_weight():
    sae = with_importance(make_sae(mask_rate=20.0, parent_weight=0.0, masked_weight=0.25), HALF)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[3:9] = True
    output = sae.training_forward_pass(step_input(torch.randn(64, 8), dead))
    losses = output.losses
    revival = losses["auxiliary_reconstruction_loss"]
    assert revival > 0
    assert losses["masked_auxiliary_reconstruction_loss"] == 0
    expected = 0.75 * losses["mse_loss"] + 0.25 * losses["masked_mse_loss"] + revival
    torch.testing.assert_close(output.loss, expected)


@every_activation
def test_at_weight_1_a_masked_latent_gets_no_gradient(activation):
    fields = {"activation": activation, "masked_weight": 1.0, "parent_weight": 0.0}
    sae = with_importance(make_sae(**fields, mask_rate=20.0), HALF)
    keep = sae.draw_mask().keep  # the first half is masked with probability 1 - exp(-20)
    assert keep.tolist() == [False] * 12 + [True] * 12
    sae.training_forward_pass(step_input(torch.randn(64, 8))).loss.backward()
    assert not sae.W_enc.grad[:, :12].any()
    assert not sae.W_dec.grad[:12].any()
    assert not sae.b_enc.grad[:12].any()
    assert sae.W_dec.grad[12:].any()


def test_an_infinite_full_loss_does_not_spoil_the_masked_one():
    sae = make_sae(masked_weight=1.0)
    loss = sae.weighted_loss({"mse_loss": torch.tensor(math.inf)}, {"mse_loss": torch.tensor(2.0)})
    assert loss == 2


@every_preset
def test_the_output_shows_the_full_pass(preset):
    sae = with_importance(make_sae(**preset, mask_rate=20.0), HALF)
    x = torch.randn(256, 8)
    acts, hidden_pre = sae.encode_with_hidden_pre(x)
    assert acts[:, :12].any()
    output = sae.training_forward_pass(step_input(x))
    torch.testing.assert_close(output.feature_acts.to_dense(), acts)
    torch.testing.assert_close(output.hidden_pre, hidden_pre, check_stride=False)
    torch.testing.assert_close(output.sae_out, sae.decode(acts), check_stride=False)


# --- averages ------------------------------------------------------------------------------------


@every_preset
def test_averages_are_measured_in_the_pass_that_is_trained(preset):
    sae = make_sae(**preset, mask_rate=60.0, importance_decay=0.0)
    with_importance(sae, 0.1 + 0.9 * HALF)
    assert not sae.draw_mask().keep[:12].any()
    x = torch.randn(256, 8)
    before = sae.tracker.averages().frequency.clone()
    acts = sae.training_forward_pass(step_input(x)).feature_acts.to_dense()
    frequency = (acts > 0).float().mean(0)
    if preset:  # the paper's: masked latents keep their averages
        frequency[:12] = before[:12]
    torch.testing.assert_close(sae.tracker.averages().frequency, frequency)


@every_preset
def test_a_masked_latent_is_not_counted_as_dead(preset):
    sae = make_sae(**preset, mask_warm_up_steps=0, c_start=1.0)
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
        masked += int((~sae.draw_mask().keep[2:]).sum())
        trainer.step(next(trainer.data_provider))
    assert masked > 50
    assert trainer.dead_neurons[:2].all()
    assert not trainer.dead_neurons[2:].any()


def test_updates_go_through_the_context():
    """A context that keeps the updates leaves the SAE as it was; running them updates it."""
    sae, queue = make_sae(parent_start=0.0), []
    x = torch.randn(64, 8)
    plain = copy.deepcopy(sae)
    plain.training_forward_pass(step_input(x))
    sae.context = StepContext()
    sae.context.after_step = queue.append
    before = copy.deepcopy(sae.state_dict())
    sae.training_forward_pass(step_input(x))
    assert state_equal(before, sae.state_dict())
    for update in queue:
        update()
    assert state_equal(plain.state_dict(), sae.state_dict())


# --- the whole -----------------------------------------------------------------------------------


@every_preset
def test_two_runs_with_one_seed_are_equal(preset):
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(train(make_sae(**preset), 20).state_dict())
    assert state_equal(*states)


def test_batch_of_one_and_single_latent():
    sae = make_sae(d_sae=1, k=1)
    assert sae.training_forward_pass(step_input(torch.randn(1, 8))).loss.isfinite()
    assert sae.draw_mask().keep.tolist() == [True]


@pytest.mark.parametrize(
    "preset",
    [
        *PRESETS.values(),
        {"frequency_penalty": 0.5},
        {"budget_weight": 0.5},
        {"per_sample_end": 0.5},
    ],
    ids=[*PRESETS, "frequency penalty", "budgets", "per sample"],
)
def test_a_compiled_step_equals_an_eager_one(preset):
    x = torch.randn(64, 8)
    sae = with_importance(
        make_sae(**preset, kernels="dense", schedule_steps=10_000, parent_start=0.0), HALF
    )
    compiled = copy.deepcopy(sae)
    forward = torch.compile(compiled.training_forward_pass, backend="eager")
    for step in range(2):
        a = sae.training_forward_pass(step_input(x, step=step))
        b = forward(step_input(x, step=step))
        torch.testing.assert_close(a.loss, b.loss)
    assert state_equal(sae.state_dict(), compiled.state_dict())


def test_a_mask_on_the_child_gives_the_parent_its_gradient_back():
    """The child's latent holds parent and child, so that the parent's latent need not fire beside
    it. Where the child's latent is masked, the loss makes the parent's latent fire."""
    sae = make_sae(d_in=2, d_sae=2, activation="relu", l1_coefficient=0.0, masked_weight=1.0)
    sae.W_enc.data = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])  # parent: fires without the child
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    sae.b_enc.data.zero_()
    with_child = torch.tensor([[1.0, 1.0]])
    acts, _ = sae.encode_with_hidden_pre(with_child)
    assert acts.tolist() == [[0.0, 1.0]]
    assert torch.equal(sae.decode(acts), with_child)
    sae.b_enc.data[0] = 1e-3  # just above zero, where a gradient exists
    gradients = []
    for importance in ([1.0, 1.0], [1.0, 0.0]):
        with_importance(sae, torch.tensor(importance))
        sae.cfg.mask_rate = 40.0
        sae.zero_grad()
        sae.training_forward_pass(step_input(with_child)).loss.backward()
        gradients.append(sae.b_enc.grad[0].item())
    assert gradients[0] >= 0  # no mask: the parent's latent is pushed down
    assert gradients[1] < -1  # child masked: it is pushed up


def test_saving_before_the_end_of_the_schedule_warns(tmp_path):
    sae = train(make_sae(schedule_steps=100), 20)
    with pytest.warns(UserWarning, match="20 of schedule_steps = 100"):
        sae.save_inference_model(tmp_path)
