import math

import pytest
import torch
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_atm.compare.plan.l0_target import L0Parameter
from sae_lens_atm.compare.report.results import Curve
from sae_lens_atm.compare.run.curve import (
    CurveRecorder,
    HeldOutBatch,
    feature_groups,
    importance_of_groups,
    peak_resident_mib,
    still_moving,
)
from sae_lens_atm.compare.run.l0_controller import L0Controller
from sae_lens_atm.data.synthetic import HierarchyModelConfig, build_hierarchy_model, children_of
from sae_lens_atm.training.hooks import StepTimer
from sae_lens_atm.training.latent_history import LatentHistory
from sae_lens_atm.training.supervise import supervise
from tests.helpers import state_equal


def hierarchy():
    # one root (0) with children 1 and 2, the first of which has children too
    return build_hierarchy_model(
        HierarchyModelConfig(hidden_dim=16, roots=1, branching=2, depth=2, lone_features=2)
    )


def curve(explained_variance, dead, steps=None):
    n = len(explained_variance)
    return Curve(
        steps=steps or [100 * (i + 1) for i in range(n)],
        explained_variance=explained_variance,
        dead_latents=dead,
        l0=[4.0] * n,
    )


@pytest.mark.parametrize(
    ("explained_variance", "dead", "moving"),
    [
        ([0.1] * 8 + [0.8, 0.1, 0.8049], [50] * 11, False),
        ([0.1] * 8 + [0.8, 0.8, 0.8051], [50] * 11, True),
        ([0.8] * 11, [50] * 10 + [52], False),
        ([0.8] * 11, [50] * 10 + [54], True),
        ([0.8] * 10 + [None], [50] * 11, False),
        ([0.8], [50], False),
    ],
)
def test_still_moving_looks_at_the_last_tenth(explained_variance, dead, moving):
    # of 1100 steps: from step 900 on, what was seen last before 990
    assert still_moving(curve(explained_variance, dead), d_sae=150) is moving


def test_still_moving_looks_at_the_end_before_the_decay():
    values = [0.1, 0.7, 0.79, 0.8, 0.81, 0.81, 0.81, 0.81, 0.81, 0.81]
    seen = curve(values, [0] * 10)  # of 1000 steps
    assert not still_moving(seen, 100)
    assert not still_moving(seen, 100, decay_steps=300)
    assert still_moving(seen, 100, decay_steps=500)  # from step 400 to 500


def test_explained_variance_and_saved_bits_of_a_held_out_batch_by_hand():
    sae = TrainingSAE.from_dict({"architecture": "topk", "d_in": 2, "d_sae": 2, "k": 1})
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    x = torch.tensor([[3.0, 1.0], [1.0, 3.0]])
    # reconstructed (3, 0) and (0, 3): residuals 1 and 1; about the mean (2, 2) variance 2 and 2
    sae.train()
    assert HeldOutBatch(x).evaluate(sae, ActivationScaler()) == {
        "explained_variance": pytest.approx(1 - 2 / 4),
        # V 2, E 1, d 2 and L0 1. Both latents fire half of the time, at the same level.
        "saved_bits": pytest.approx(math.log2(2 / 1.5) - 2),
    }
    assert sae.training


def test_absorption_of_a_held_out_batch():
    model = hierarchy()
    sae = TrainingSAE.from_dict({"architecture": "topk", "d_in": 16, "d_sae": 9, "k": 3})
    torch.manual_seed(0)
    x, features = model.sample_with_features(500)
    with torch.no_grad():
        vectors = model.feature_dict.feature_vectors
        sae.W_dec.copy_(vectors)
        sae.W_enc.copy_(torch.linalg.pinv(vectors))
        sae.b_enc.zero_()
        sae.b_dec.copy_(model.feature_dict.bias)
    batch = HeldOutBatch(x, features.to_dense(), model)
    seen = batch.evaluate(sae, ActivationScaler())
    assert seen["explained_variance"] > 0.99
    assert seen["absorption_fraction"] < 0.02
    with torch.no_grad():
        sae.W_enc[:, 0] -= 3 * sae.W_enc[:, 1]  # child 1 absorbs its parent 0
        sae.W_dec[1] += vectors[0]
        seen = batch.evaluate(sae, ActivationScaler())
        sae.b_dec.mul_(4)  # a power of two, so that nothing is rounded differently
    assert seen["absorption_fraction"] > 0.02
    scaled = batch.evaluate(sae, ActivationScaler(scaling_factor=4.0))
    assert scaled["absorption_fraction"] == pytest.approx(seen["absorption_fraction"])
    scaler = ActivationScaler()
    scaler.estimate_whitening(16, iter([x, x]), 2)
    assert "absorption_fraction" not in batch.evaluate(sae, scaler)


def trained(steps=20, architecture="atm", **fields):
    torch.manual_seed(0)
    sae = TrainingSAE.from_dict({"architecture": architecture, "d_in": 8, "d_sae": 16, **fields})
    cfg = SAETrainerConfig(steps * 32, 32, lr=1e-2, lr_end=1e-3)
    return SAETrainer(cfg, sae, (torch.randn(32, 8) for _ in range(steps)))


def recorded(trainer, points, controller=None):
    """Train with a recorder, and return it."""
    timer = StepTimer(trainer.sae.device)
    recorder = CurveRecorder(trainer, points, timer, None, controller)
    hooks = [timer, *([] if controller is None else [controller]), recorder]
    with supervise(trainer, hooks):
        trainer.fit()
    return recorder


def with_latents(trainer, points, folder):
    latents = LatentHistory(trainer, folder, points)
    with supervise(trainer, [latents]):
        trainer.fit()
    return latents


def test_the_recorder_of_a_training():
    trainer = trained(k=2, mask_warm_up_steps=2)
    recorder = recorded(trainer, [5, 10, 20])
    curve = recorder.curve()
    assert curve.steps == [5, 10, 20]
    assert curve.l0 == [2.0, 2.0, 2.0]
    assert curve.coefficient == []
    assert len(curve.explained_variance) == len(curve.dead_latents) == 3
    assert recorder.step_ms > 0
    assert recorder.seconds > 0
    assert math.isnan(peak_resident_mib()) or recorder.peak_memory_mib >= 0


def test_quartiles_of_importance_of_groups(tmp_path):
    trainer = trained(k=2, mask_warm_up_steps=2)
    latents = with_latents(trainer, [5, 10, 20], tmp_path)
    importance = importance_of_groups(latents, {"a": [0, 1, 2], "none": []})
    assert importance.steps == [5, 10, 20]
    assert importance.latents == {"a": 3}
    final = trainer.sae.draw_mask().importance[:3].sort().values
    # Quartiles of three numbers: midpoint of the lower two, the middle, midpoint of the upper two.
    expected = [(final[0] + final[1]) / 2, final[1], (final[1] + final[2]) / 2]
    assert importance.groups["a"][-1] == pytest.approx([v.item() for v in expected])
    assert importance.threshold[-1] == pytest.approx(trainer.sae.draw_mask().threshold.item())


def test_recording_changes_nothing():
    plain = trained(k=2)
    plain.fit()
    observed = trained(k=2)  # seeds the data anew
    recorded(observed, [5, 10, 20])
    assert state_equal(plain.sae.state_dict(), observed.sae.state_dict())


def test_other_saes_have_no_importance(tmp_path):
    trainer = trained(architecture="standard", l1_coefficient=0.1)
    controller = L0Controller(trainer, L0Parameter("l1", True), 2.0)
    recorder = recorded(trainer, [20], controller)
    latents = with_latents(trained(architecture="standard", l1_coefficient=0.1), [20], tmp_path)
    assert importance_of_groups(latents, {"a": [0]}) is None
    assert recorder.curve().coefficient == [pytest.approx(controller.value)]


def test_a_recorder_is_restored_from_a_checkpoint(tmp_path):
    recorder = recorded(trained(k=2), [5, 20])
    recorder.on_checkpoint(tmp_path)
    trainer = trained(k=2)
    again = CurveRecorder(trainer, [5, 20], StepTimer(trainer.sae.device))
    again.load(tmp_path)
    assert again.curve() == recorder.curve()
    assert again.step_ms == recorder.step_ms
    assert again.seconds > recorder.seconds - 1


def test_groups_are_the_latents_of_roots_parents_and_children():
    model = hierarchy()
    children = children_of(model.hierarchy)
    assert set(children) == {0, 1, 4}
    decoder = torch.zeros(9, 16)
    for latent, feature in enumerate([0, 1, 2, 3, 6, 8]):  # 4 and 5 are not learned, 8 is alone
        decoder[latent] = 2 * model.feature_dict.feature_vectors[feature]
    decoder[6:] = torch.randn(3, 16).abs() * 1e-6 + 1e-9
    groups = feature_groups(model, decoder)
    assert groups["roots"] == [0]
    assert groups["parents below a root"] == [1]
    assert sorted(groups["last children"]) == [2, 3, 4]
