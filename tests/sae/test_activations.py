"""Sparse steps against dense ones, and what each activation function adds."""

import copy
from dataclasses import replace

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TrainingSAE,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sae_lens_atm.method import parents
from sae_lens_atm.sae.atm_sae import ATMTrainingSAE
from tests.helpers import make_sae, step_input, train
from tests.sae.test_atm_sae import HALF, with_importance

both_kernels = pytest.mark.parametrize("kernels", ["auto", "dense"])


def twin(sae, **changes):
    """The same SAE, with some fields of its configuration changed."""
    other = TrainingSAE.from_dict(replace(sae.cfg, **changes).to_dict())
    other.load_state_dict(sae.state_dict())
    return other


def compare_step(a, b, x, dead):
    """One step of both: losses, gradients, statistics."""
    outputs = []
    for sae in (a, b):
        output = sae.training_forward_pass(step_input(x, dead))
        output.loss.backward()
        outputs.append(output)
    assert outputs[0].losses.keys() == outputs[1].losses.keys()
    assert_close(outputs[0].losses, outputs[1].losses)
    assert_close(outputs[0].loss, outputs[1].loss)
    assert_close(outputs[0].sae_out, outputs[1].sae_out)
    assert_close(outputs[0].feature_acts.to_dense(), outputs[1].feature_acts.to_dense())
    for name, parameter in a.named_parameters():
        assert_close(parameter.grad, b.get_parameter(name).grad, msg=lambda m, n=name: f"{n}: {m}")
    for name, buffer in a.named_buffers():
        assert_close(buffer, b.get_buffer(name), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("masked_weight", [0.5, 1.0])
@pytest.mark.parametrize("rescale_acts_by_decoder_norm", [True, False])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_sparse_steps_are_the_dense_ones(
    masked_weight, rescale_acts_by_decoder_norm, apply_b_dec_to_input
):
    torch.manual_seed(0)
    sae = make_sae(
        d_in=12,
        d_sae=64,
        k=4,
        dtype="float64",
        masked_weight=masked_weight,
        mask_warm_up_steps=0,
        schedule_steps=16,
        rescale_acts_by_decoder_norm=rescale_acts_by_decoder_norm,
        apply_b_dec_to_input=apply_b_dec_to_input,
    )
    sae.W_dec.data *= torch.rand(64, 1, dtype=torch.float64) + 0.5
    sae.b_dec.data.normal_()
    sae.b_enc.data.normal_()
    dense = twin(sae, kernels="dense")
    dead = torch.zeros(64, dtype=torch.bool)
    sparse_steps = 0
    for step in range(16):  # the schedule has all its phases
        x = torch.randn(50, 12, dtype=torch.float64)
        dead[step * 3 : step * 3 + 5] = True
        sae.zero_grad()
        dense.zero_grad()
        compare_step(sae, dense, x, dead)
        sparse_steps += sae.training_forward_pass(step_input(x)).feature_acts.is_sparse
        dense.training_forward_pass(step_input(x))
    assert sparse_steps == 16


def product(a, b, *_, **__):
    """FLOPs of a product of matrices: torch's counter takes a sparse one for a dense one."""
    entries = a.numel() if a.layout == torch.strided else a.values().numel()
    return 2 * entries * b.shape[1]


def sum_and_product(_, a, b, **__):
    return product(a, b)


def sampled(pattern, a, *_, **__):
    return 2 * pattern.values().numel() * a.shape[1]


def flops(sae, x):
    aten = torch.ops.aten
    formulas = {aten.mm: product, aten.addmm: sum_and_product, aten.sparse_sampled_addmm: sampled}
    for formula in formulas.values():
        formula._get_raw = True
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        sae.training_forward_pass(step_input(x)).loss.backward()
    return counter.get_total_flops()


def test_one_product_of_a_sparse_step_is_dense():
    """It is the encoder's. Decoding and the gradients of activations, decoder, encoder and input
    are products with the active latents alone. The statistics have no product of their own."""
    x = torch.randn(64, 16)
    plain = {"d_in": 16, "d_sae": 128, "k": 4, "parent_weight": 0.0, "mask_rate": 0.0}
    assert flops(make_sae(**plain), x) == 2 * 64 * 16 * (128 + 5 * 4)
    assert flops(make_sae(**plain, kernels="dense"), x) == 2 * 64 * 16 * 7 * 128


class Waits(TorchDispatchMode):
    """Counts operations that make the host wait for its device: those that return data to it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket
        indexed = name is torch.ops.aten.index.Tensor.overloadpacket and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        self.count += indexed or name in waits
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ["relu", "batchtopk"])
def test_a_dense_step_waits_for_the_device_no_more_often_than_saelens(activation, monkeypatch):
    """Counted on a CPU: the operations that make a host wait are the same there."""
    monkeypatch.setattr(parents, "sparse_products_are_fast", lambda _: False)
    x = torch.randn(64, 8)
    atm = make_sae(activation=activation, kernels="dense", mask_warm_up_steps=0, parent_start=0.0)
    atm.training_forward_pass(step_input(x))
    if activation == "relu":
        plain = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=8, d_sae=24))
    else:
        plain = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=8, d_sae=24, k=3))
    counts = []
    for sae in (atm, plain):
        with Waits() as waits:
            sae.training_forward_pass(step_input(x)).loss.backward()
        counts.append(waits.count)
    assert counts[0] <= counts[1]


def test_hooks_on_activations_are_served_by_the_dense_path():
    sae: ATMTrainingSAE = make_sae()
    seen = []
    sae.add_hook("hook_sae_acts_post", lambda acts, hook: seen.append(acts.shape))  # noqa: ARG005
    sae.training_forward_pass(step_input(torch.randn(4, 8)))
    assert seen == [(4, 24)]


@both_kernels
@pytest.mark.parametrize("masked_weight", [0.5, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_reaches_no_average(kernels, masked_weight, bad):
    fields = {"kernels": kernels, "masked_weight": masked_weight, "parent_start": 0.0}
    sae = train(make_sae(d_sae=64, **fields), 6)
    averaged = ("magnitude", "frequency", "contribution", "weight", "inputs", "mean_input")
    before = {n: b.clone() for n, b in sae.named_buffers() if n.split(".")[-1] in averaged}
    x = torch.randn(32, 8)
    x[4:12] = bad
    sae.training_forward_pass(step_input(x))
    for name, buffer in before.items():
        assert torch.equal(sae.get_buffer(name), buffer), name
    sae.training_forward_pass(step_input(torch.randn(32, 8)))
    assert sae.importance.isfinite().all()


@both_kernels
def test_fewer_latents_may_be_kept_than_k(kernels):
    sae = make_sae(k=2.5, masked_weight=1.0, mask_rate=40.0, kernels=kernels, parent_weight=0.0)
    with_importance(sae, torch.cat([torch.zeros(22), torch.ones(2)]))
    output = sae.training_forward_pass(step_input(torch.randn(32, 8)))
    output.loss.backward()
    assert output.loss.isfinite()
    assert not sae.W_dec.grad[:22].any()


@both_kernels
def test_another_squared_error_is_used(kernels):
    sae = make_sae(kernels=kernels, mask_rate=0.0, parent_weight=0.0)
    sae.mse_loss_fn = lambda predicted, x: (predicted - x).abs()
    x = torch.randn(16, 8)
    output = sae.training_forward_pass(step_input(x))
    assert_close(output.loss, (output.sae_out - x).abs().sum(1).mean())


@both_kernels
def test_the_masked_pass_chooses_its_k_among_the_kept_latents(kernels):
    sae = with_importance(make_sae(mask_rate=20.0, kernels=kernels), HALF)
    batch = step_input(torch.randn(256, 8))
    full = sae.full_pass(batch)
    masked = sae.masked_pass(batch, full, sae.draw_mask().keep)
    assert full.feature_acts.to_dense().count_nonzero() == 3 * 256
    assert masked.feature_acts.to_dense().count_nonzero() == 3 * 256
    assert not masked.feature_acts.to_dense()[:, :12].any()


@both_kernels
def test_the_threshold_of_inference_follows_the_full_pass(kernels):
    torch.manual_seed(0)
    plain = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=8, d_sae=24, k=3))
    sae = make_sae(masked_weight=1.0, mask_rate=20.0, parent_weight=0.0, kernels=kernels)
    sae.load_state_dict(plain.state_dict(), strict=False)
    with_importance(sae, HALF)
    for _ in range(20):
        x = torch.randn(64, 8)
        for each in (plain, sae):
            each.training_forward_pass(step_input(x))
    assert plain.topk_threshold > 0
    assert_close(sae.topk_threshold, plain.topk_threshold)


@both_kernels
@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
def test_dead_latents_are_revived_with_clipped_activations(slope, kernels):
    """The auxiliary loss against brute force: the residual minus the dead latents' part."""
    off = {"mask_rate": 0.0, "parent_weight": 0.0}
    sae = make_sae(**off, d_sae=32, k=2, aux_negative_slope=slope, kernels=kernels)
    x = torch.randn(64, 8)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[1, 4, 6]] = True
    with torch.no_grad():
        sae.b_enc[4] = -100.0  # the only one that is negative on the whole batch
    output = sae.training_forward_pass(step_input(x, dead))
    with torch.no_grad():
        norm = sae.W_dec.norm(dim=1)
        hidden = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * norm
        acts = hidden.relu()
        acts[:, 4] = slope * hidden[:, 4]
        assert (hidden[:, 4] < 0).all()
        assert (hidden[:, [1, 6]] > 0).any(0).all()
        explained = acts[:, dead] @ (sae.W_dec / norm[:, None])[dead]
        # 3 dead latents of the 4 that SAELens would use: three quarters of the weight
        expected = 0.75 * (explained - (x - output.sae_out)).square().sum(1).mean()
    assert_close(output.losses["auxiliary_reconstruction_loss"], expected)


@both_kernels
def test_a_latent_that_is_negative_on_the_whole_batch_can_be_revived(kernels):
    """Its encoder gets a gradient unless the slope is 0."""
    x = torch.randn(64, 8)
    dead = torch.arange(32) == 5
    for slope in (0.0, 0.1):
        sae = make_sae(d_sae=32, k=2, aux_negative_slope=slope, kernels=kernels)
        with torch.no_grad():
            sae.b_enc[5] = -100.0
        output = sae.training_forward_pass(step_input(x, dead))
        output.losses["auxiliary_reconstruction_loss"].backward()
        assert (sae.W_enc.grad[:, 5].abs().max() > 0) == (slope > 0)


def test_hooks_see_both_passes_on_the_dense_path():
    sae = with_importance(make_sae(d_sae=64, mask_rate=40.0), torch.linspace(0, 1, 64))
    shapes = []
    sae.add_hook("hook_sae_recons", lambda out, hook: shapes.append(out.shape))  # noqa: ARG005
    output = sae.training_forward_pass(step_input(torch.randn(4, 8)))
    assert shapes == [(4, 8), (4, 8)]
    assert not output.feature_acts.is_sparse


@both_kernels
def test_each_sample_keeps_its_own_largest_until_per_sample_end(kernels):
    x = torch.randn(64, 8) * torch.linspace(0.1, 5, 64)[:, None]  # samples of uneven length
    sae = make_sae(k=3.4, kernels=kernels, schedule_steps=10, per_sample_end=0.2, mask_rate=0.0)
    for step in range(4):
        pre = sae.encode_with_hidden_pre(x)[1].detach()
        acts = sae.training_forward_pass(step_input(x, step=step)).feature_acts.to_dense()
        each = (acts > 0).sum(1)
        if step < 2:
            largest = pre.topk(3).indices
            kept = torch.zeros_like(pre, dtype=torch.bool).scatter(1, largest, True) & (pre > 0)
            assert torch.equal(acts > 0, kept)
        else:
            assert each.sum() == int(3.4 * 64)
            assert each.max() > 4


def test_masks_and_a_copy_keep_the_largest_of_each_sample():
    sae = make_sae(k=3, kernels="dense", schedule_steps=100, per_sample_end=0.5)
    keep, x = torch.ones(24), torch.randn(64, 8)
    keep[:12] = 0
    pre = sae.encode_with_hidden_pre(x)[1]
    masked = sae.activation_fn(pre * keep)
    assert not masked[:, :12].any()
    assert ((masked > 0).sum(1) <= 3).all()
    other = copy.deepcopy(sae)
    other.tracker.steps.fill_(50)  # the copy now chooses in the batch
    assert other.activation_fn(pre).count_nonzero(1).max() > 3
    assert sae.activation_fn(pre).count_nonzero(1).max() <= 3
