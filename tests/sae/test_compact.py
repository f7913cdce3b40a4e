"""Steps that compute only what is active and kept, against those that compute everything."""

from dataclasses import replace

import pytest
import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    StandardTrainingSAE,
    TrainingSAE,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sae_lens_atm.method import parents
from sae_lens_atm.sae.atm_sae import ATMTrainingSAE
from sae_lens_atm.sae.forward_pass import narrowed
from tests.helpers import ACTIVATIONS, SCHEDULES, make_sae, step_input, train
from tests.sae.test_atm_sae import with_importance

every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


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


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rescale_acts_by_decoder_norm", [True, False])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_sparse_steps_are_the_dense_ones(
    schedule, rescale_acts_by_decoder_norm, apply_b_dec_to_input
):
    torch.manual_seed(0)
    sae = make_sae(
        d_in=12,
        d_sae=64,
        k=4,
        dtype="float64",
        schedule=schedule,
        masked_probability=0.5,
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


@pytest.mark.parametrize("fields", [{"masked_choice": "inherited"}, {"k_start": 3.0}])
def test_sparse_steps_are_the_dense_ones_with_other_choices(fields):
    torch.manual_seed(0)
    sae = make_sae(d_in=12, d_sae=64, k=2, dtype="float64", mask_warm_up_steps=0, **fields)
    dense = twin(sae, kernels="dense")
    dead = torch.zeros(64, dtype=torch.bool)
    for _ in range(10):
        sae.zero_grad()
        dense.zero_grad()
        compare_step(sae, dense, torch.randn(50, 12, dtype=torch.float64), dead)


@pytest.mark.parametrize("kernels", ["auto", "dense"])
def test_an_inherited_choice_is_the_full_views_without_the_masked_latents(kernels):
    torch.manual_seed(0)
    sae = make_sae(d_sae=48, kernels=kernels, masked_choice="inherited")
    keep = torch.rand(48) < 0.5
    batch = step_input(torch.randn(40, 8), torch.zeros(48, dtype=torch.bool))
    full = sae.full_view(batch)
    masked = sae.masked_view(batch, keep, full)
    out = (full.acts.to_dense() * keep / sae.W_dec.norm(dim=-1)) @ sae.W_dec + sae.b_dec
    assert_close(masked.sae_out, out.detach(), check_stride=False)
    assert 0 < len(masked.seen().signals.frequency.nonzero()) <= int(keep.sum())


@pytest.mark.parametrize("kernels", ["auto", "dense"])
def test_k_falls_to_its_value_where_masking_ends(kernels):
    sae = make_sae(k=2, k_start=3.0, mask_end=0.5, schedule_steps=8, kernels=kernels)
    sae.b_enc.data += 100  # all latents would fire
    counts = [
        sae.training_forward_pass(step_input(torch.randn(10, 8))).feature_acts.to_dense()
        for _ in range(6)
    ]
    assert [int(acts.count_nonzero()) for acts in counts] == [60, 50, 40, 30, 20, 20]


@every_activation
@pytest.mark.parametrize("kernels", ["auto", "dense"])
def test_a_step_on_the_kept_latents_is_the_step_with_the_others_at_nothing(
    activation, kernels, monkeypatch
):
    torch.manual_seed(0)
    sae = make_sae(
        d_sae=48,
        activation=activation,
        kernels=kernels,
        schedule="masked",
        dtype="float64",
        jumprelu_bandwidth=0.5,
        pre_act_loss_coefficient=1.0,
    )
    with_importance(sae, torch.linspace(0, 2, 48))
    masking = twin(sae)

    def masked_after(step_input, keep):
        encoded = masking.encode_with_hidden_pre(step_input.sae_in)
        dead = masking._dead_and_kept(step_input.dead_neuron_mask, keep)
        view = masking._masked(replace(step_input, dead_neuron_mask=dead), keep, *encoded)
        return view._replace(acts=view.acts * keep, full_acts=None)

    def shown(step_input, keep):  # the activations of the masked view, not of the full SAE
        view = masked_after(step_input, keep)
        acts, _ = masking.mask_acts(*masking.encode_with_hidden_pre(step_input.sae_in), keep)
        return view._replace(acts=acts)

    monkeypatch.setattr(masking, "narrow_view", shown)
    monkeypatch.setattr(masking.cfg, "kernels", "dense")
    dead = torch.zeros(48, dtype=torch.bool)
    dead[::3] = True
    masked = 0
    for _ in range(10):
        keep = sae.draw_mask(1).keep
        masked += int((~keep).sum())
        sae.zero_grad()
        masking.zero_grad()
        compare_step(sae, masking, torch.randn(40, 8, dtype=torch.float64), dead)
        for name in ("W_enc", "W_dec", "b_enc"):
            grad = sae.get_parameter(name).grad
            assert not (grad.T if name == "W_enc" else grad)[~keep].any()
    assert masked > 50


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


@every_activation
@pytest.mark.parametrize("kernels", ["auto", "dense"])
def test_the_work_of_a_masked_step_shrinks_with_what_is_kept(activation, kernels):
    x = torch.randn(64, 16)
    work = {}
    for kept in (16, 32, 64, 128):
        sae = make_sae(
            d_in=16,
            d_sae=128,
            activation=activation,
            kernels=kernels,
            schedule="masked",
            mask_rate=80.0,
            parent_weight=0.0,
        )
        importance = torch.zeros(128)
        importance[:kept] = 1.0
        with_importance(sae, importance)
        sae.tracker.steps.fill_(1001)  # not one of the steps that look at the full SAE
        assert sae.draw_mask(1).keep.sum() == kept
        work[kept] = flops(sae, x)
    # in proportion, but for the products with the k active of each sample, where those are sparse
    fixed = 5 * 2 * 64 * 3 * 16 if (activation, kernels) == ("batchtopk", "auto") else 0
    for kept in (16, 32, 64):
        expected = fixed + (work[128] - fixed) * kept / 128
        assert work[kept] == pytest.approx(expected, rel=0.01)


def test_of_the_products_of_a_sparse_step_one_is_dense():
    """Encode. Decode, the gradients of activations, decoder, encoder and input (for `b_dec`) are
    products with the active latents alone, and the statistics have none of their own."""
    x = torch.randn(64, 16)
    plain = {"d_in": 16, "d_sae": 128, "k": 4, "parent_weight": 0.0, "mask_rate": 0.0}
    assert flops(make_sae(**plain), x) == 2 * 64 * 16 * (128 + 5 * 4)
    assert flops(make_sae(**plain, kernels="dense"), x) == 2 * 64 * 16 * 7 * 128


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_curves_lie_on_one_another(schedule):
    directions = torch.nn.functional.normalize(torch.randn(48, 16), dim=1)
    curves, finals = [], []
    for kernels in ("auto", "dense"):
        torch.manual_seed(0)
        sae = make_sae(
            d_in=16, d_sae=64, k=3, kernels=kernels, schedule=schedule, schedule_steps=200
        )
        losses = []
        forward = sae.training_forward_pass

        def listen(given, forward=forward, losses=losses):
            output = forward(given)
            losses.append(output.losses["mse_loss"].item())
            return output

        sae.training_forward_pass = listen

        def data(step):
            generator = torch.Generator().manual_seed(step)
            draw = torch.rand(128, 48, generator=generator)
            return ((draw < 0.06) * draw * 16) @ directions

        train(sae, 200, data=data)
        curves.append(torch.tensor(losses))
        finals.append(sae)
    assert curves[0][-20:].mean() < 0.5 * curves[0][:20].mean()
    assert_close(curves[0], curves[1], rtol=0.02, atol=0.0)
    cosine = torch.cosine_similarity(finals[0].W_dec, finals[1].W_dec, dim=1)
    assert cosine.median() > 0.999


@every_activation
def test_a_narrowed_sae_is_itself_again_afterwards(activation):
    sae = make_sae(activation=activation)
    before = {name: p.data_ptr() for name, p in sae.named_parameters()}
    decoder = sae.W_dec
    with narrowed(sae, torch.tensor([1, 5])):
        assert sae.W_enc.shape == (8, 2)
        with narrowed(sae, torch.tensor([1])):
            assert torch.equal(sae.W_dec, decoder[5:6])
        assert sae.W_dec.shape == (2, 8)
    with pytest.raises(IndexError), narrowed(sae, torch.tensor([1])):
        sae.W_dec[5]
    assert {name: p.data_ptr() for name, p in sae.named_parameters()} == before
    assert sae.W_enc is sae.get_parameter("W_enc")


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for its device: a number or a shape that it must be told."""

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


@pytest.mark.parametrize("activation", ["jumprelu", "relu", "batchtopk"])
def test_a_dense_step_makes_no_device_wait_but_where_saelens_does(activation, monkeypatch):
    """Checked without a GPU: what forces it to wait is an operation like any other."""
    monkeypatch.setattr(parents, "sparse_products_are_fast", lambda _: False)
    x = torch.randn(64, 8)
    atm = make_sae(activation=activation, kernels="dense", mask_warm_up_steps=0, parent_start=0.0)
    atm.training_forward_pass(step_input(x))
    theirs = {"jumprelu": JumpReLUTrainingSAE, "relu": StandardTrainingSAE}.get(activation)
    plain = make_sae(activation=activation, kernels="dense", mask_rate=0.0, parent_weight=0.0)
    plain = (
        BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=8, d_sae=24, k=3))
        if theirs is None
        else theirs(plain.cfg)
    )
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


def test_the_threshold_is_learned_where_all_steps_are_masked():
    torch.manual_seed(0)
    full = make_sae(mask_rate=0.0, parent_weight=0.0)
    masked = make_sae(schedule="masked", mask_rate=20.0, mask_end=1.0, parent_weight=0.0)
    masked.load_state_dict(full.state_dict(), strict=False)
    with_importance(masked, torch.cat([torch.zeros(12), torch.ones(12)]))
    for _ in range(400):  # nothing is trained, so both have one threshold to find
        x = torch.randn(64, 8)
        full.training_forward_pass(step_input(x))
        masked.training_forward_pass(step_input(x))
    assert full.topk_threshold > 0
    assert_close(masked.topk_threshold, full.topk_threshold, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("kernels", ["auto", "dense"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_reaches_no_average(kernels, schedule, bad):
    sae = train(make_sae(d_sae=64, kernels=kernels, schedule=schedule, parent_start=0.0), 6)
    averaged = ("magnitude", "frequency", "contribution", "weight", "inputs", "mean_input")
    before = {n: b.clone() for n, b in sae.named_buffers() if n.split(".")[-1] in averaged}
    x = torch.randn(32, 8)
    x[4:12] = bad
    sae.training_forward_pass(step_input(x))
    for name, buffer in before.items():
        assert torch.equal(sae.get_buffer(name), buffer), name
    sae.training_forward_pass(step_input(torch.randn(32, 8)))
    assert sae.importance.isfinite().all()


@pytest.mark.parametrize("kernels", ["auto", "dense"])
def test_fewer_latents_may_be_kept_than_k(kernels):
    sae = make_sae(d_sae=24, k=2.5, schedule="masked", mask_rate=40.0, kernels=kernels)
    with_importance(sae, torch.cat([torch.zeros(22), torch.ones(2)]))
    output = sae.training_forward_pass(step_input(torch.randn(32, 8)))
    output.loss.backward()
    assert output.loss.isfinite()
    assert not sae.W_dec.grad[:22].any()


def test_hooks_see_all_latents_in_a_masked_step():
    sae = with_importance(
        make_sae(d_sae=64, schedule="masked", mask_rate=40.0),
        torch.cat([torch.zeros(32), torch.ones(32)]),
    )
    shapes = []
    sae.add_hook("hook_sae_acts_post", lambda acts, hook: shapes.append(acts.shape))  # noqa: ARG005
    sae.training_forward_pass(step_input(torch.randn(4, 8)))
    assert shapes == [(4, 64)]


@pytest.mark.parametrize("kernels", ["auto", "dense"])
def test_another_squared_error_is_used(kernels):
    sae = make_sae(kernels=kernels, mask_rate=0.0, parent_weight=0.0)
    sae.mse_loss_fn = lambda predicted, x: (predicted - x).abs()
    x = torch.randn(16, 8)
    output = sae.training_forward_pass(step_input(x))
    assert_close(output.loss, (output.sae_out - x).abs().sum(1).mean())


def test_the_unmasked_l0_of_masked_steps_is_that_of_the_full_sae():
    torch.manual_seed(0)
    sae = make_sae(activation="relu", schedule="masked", mask_warm_up_steps=0, mask_rate=9.0)
    x = torch.randn(512, 8)
    full = (sae.encode_with_hidden_pre(x)[0] > 0).float().sum(1).mean()
    for _ in range(30):
        output = sae.training_forward_pass(step_input(x))
    assert (output.feature_acts > 0).sum(1).float().mean() < 0.9 * full
    assert_close(output.metrics["l0_unmasked"](), full)
