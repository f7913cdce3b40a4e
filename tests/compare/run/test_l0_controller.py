import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import SAETrainer, TrainingSAE, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig

from sae_lens_atm.compare.plan.l0_target import L0Parameter, find_l0_parameter, is_matched
from sae_lens_atm.compare.run.l0_controller import L0Controller
from sae_lens_atm.sae.forward_pass import mean_l0
from sae_lens_atm.training.hooks import StepCallback
from sae_lens_atm.training.supervise import supervise


def config(architecture, **fields):
    shape = {"architecture": architecture, "d_in": 8, "d_sae": 16}
    return TrainingSAEConfig.from_dict({**shape, **fields})


def trainer_of(sae, steps, lr=3e-3, batch=64):
    torch.manual_seed(1)
    features = torch.nn.functional.normalize(torch.randn(24, sae.cfg.d_in), dim=1)
    data = ((torch.rand(batch, 24) < 0.1).float() @ features for _ in range(steps))
    cfg = SAETrainerConfig(steps * batch, batch, lr=lr, lr_end=lr / 10, dead_feature_window=100)
    return SAETrainer(cfg, sae, data)


def follow(l0s, start=0.1, target=4.0, lrs=None, warm_up=0):
    """The controller beside a trainer that only exists as far as it looks."""
    scheduler = SimpleNamespace(
        final_value=start, current_value=start, current_step=warm_up, warm_up_steps=warm_up
    )
    group = {"lr": 1.0}
    trainer = SimpleNamespace(
        coefficient_schedulers={"l1": scheduler},
        optimizer=SimpleNamespace(param_groups=[group]),
        cfg=SimpleNamespace(lr=1.0),
    )
    controller = L0Controller(trainer, L0Parameter("l1", True), target)
    values = []
    for i, l0 in enumerate(l0s):
        group["lr"] = 1.0 if lrs is None else lrs[i]
        acts = torch.zeros(10, 20)
        acts.view(-1)[: round(l0 * 10)] = 1.0
        controller.after_step(SimpleNamespace(feature_acts=acts))
        assert scheduler.final_value == scheduler.current_value == controller.value
        values.append(controller.value)
    return values


def test_a_value_that_never_suffices_stays_finite():
    values = follow([16] * 7000)  # the error is 1 in each step: the limit is reached after 6,500
    assert values[-1] == values[-2] == pytest.approx(math.exp(30.5))


def test_the_law_by_hand():
    # errors log(8/4) = .693, then log(2/4) = -.693; log(.1) + .005 * .693 + .5 * .693, ...
    log2 = math.log(2)
    first = math.log(0.1) + 0.005 * log2 + 0.5 * log2
    second = math.log(0.1) + 0.005 * log2 - 0.005 * log2 - 0.5 * log2
    assert follow([8, 2]) == pytest.approx([math.exp(first), math.exp(second)])
    # beyond e times the target the error is 1; at a tenth of the learning rate a tenth of the gain
    assert follow([20], lrs=[0.1]) == pytest.approx([math.exp(math.log(0.1) + 0.0005 + 0.5)])


def test_on_target_it_stays():
    assert follow([4.0] * 5) == pytest.approx([0.1] * 5)


@given(st.floats(0, 20))
def test_more_active_latents_than_asked_for_raise_it(l0):
    l0 = round(l0 * 10) / 10
    (value,) = follow([l0])
    assert (value > 0.1 * (1 + 1e-9)) == (l0 > 4.0)


def test_it_waits_for_the_warm_up():
    scheduler = SimpleNamespace(final_value=0.1, current_value=0.0, current_step=3, warm_up_steps=9)
    trainer = SimpleNamespace(coefficient_schedulers={"l1": scheduler})
    controller = L0Controller(trainer, L0Parameter("l1", True), 4)
    controller.after_step(SimpleNamespace(feature_acts=torch.ones(2, 20)))
    assert (scheduler.current_value, scheduler.final_value) == (0.0, 0.1)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("standard", {"l1_coefficient": 0.05, "l1_warm_up_steps": 20}),
        ("gated", {"l1_coefficient": 0.05}),
        ("jumprelu", {"l0_coefficient": 0.05}),
        ("atm", {"activation": "relu", "l1_coefficient": 0.05}),
    ],
)
def test_the_l0_of_real_training_comes_to_the_target(architecture, fields):
    cfg = config(architecture, **{"d_sae": 24, **fields})
    sae = TrainingSAE.from_dict(cfg.to_dict())
    trainer = trainer_of(sae, 1500, lr=1e-2, batch=128)
    controller = L0Controller(trainer, find_l0_parameter(cfg), 3.0)
    seen = []
    record = StepCallback(
        trainer, lambda _, output: seen.append(float(mean_l0(output.feature_acts)))
    )
    with supervise(trainer, [controller, record]):
        trainer.fit()
    assert seen[0] > 4
    assert is_matched(sum(seen[-100:]) / 100, 3.0), (seen[::150], controller.value)


def test_a_number_of_the_config_can_be_controlled_too():
    cfg = config("matching_pursuit", decoder_init_norm=1.0, residual_threshold=3.0)
    sae = TrainingSAE.from_dict(cfg.to_dict())
    trainer = trainer_of(sae, 1)
    controller = L0Controller(trainer, L0Parameter("residual_threshold", True), 1.0)
    assert controller.value == 3.0
    controller.after_step(SimpleNamespace(feature_acts=torch.ones(4, 16)))
    assert sae.cfg.residual_threshold > 3.0


def test_its_state_goes_on_in_the_warm_up():
    cfg = config("standard", l1_coefficient=0.1, l1_warm_up_steps=10)
    sae = TrainingSAE.from_dict(cfg.to_dict())
    straight, halting = trainer_of(sae, 1), trainer_of(sae, 1)
    first = L0Controller(straight, L0Parameter("l1", True), 2.0)
    for trainer in (straight, halting):
        for _ in range(3):
            trainer.coefficient_schedulers["l1"].step()
    second = L0Controller(halting, L0Parameter("l1", True), 2.0)
    second.load_state_dict(first.state_dict())
    expected = straight.coefficient_schedulers["l1"].current_value
    assert expected == pytest.approx(0.03)
    assert halting.coefficient_schedulers["l1"].current_value == expected


def test_its_state_goes_on():
    sae = TrainingSAE.from_dict(config("standard").to_dict())
    one, other = trainer_of(sae, 1), trainer_of(sae, 1)
    first = L0Controller(one, L0Parameter("l1", True), 2.0)
    output = SimpleNamespace(feature_acts=torch.ones(4, 16))
    for _ in range(3):
        first.after_step(output)
    second = L0Controller(other, L0Parameter("l1", True), 2.0)
    second.load_state_dict(first.state_dict())
    assert second.value == first.value
    first.after_step(output)
    second.after_step(output)
    assert second.value == first.value
