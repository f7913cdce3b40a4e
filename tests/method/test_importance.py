import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_atm import ImportanceTracker, Signals, batch_signals, combine_signals
from sae_lens_atm.method.importance import effective_latents, normalize
from tests.helpers import ACTIVATIONS, make_sae, step_input, train


def test_signals_by_hand():
    # Two latents in the plane, d_0 = (2, 0), d_1 = (0, 1); two samples.
    acts = torch.tensor([[1.0, 0.0], [3.0, 4.0]])
    decoder = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    residual = torch.tensor([[0.5, 0.0], [-1.0, 2.0]])

    signals = batch_signals(acts, decoder, residual)

    assert signals.magnitude.tolist() == [4.0, 2.0]  # |d| times the mean
    assert signals.frequency.tolist() == [1.0, 0.5]
    # latent 0: (2*1*1 + 4*1)/2 + (2*3*(-2) + 4*9)/2 = 3 + 12; latent 1: (2*4*2 + 16)/2
    assert signals.contribution.tolist() == [15.0, 16.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contribution_is_what_leaving_the_latent_out_adds(dtype):
    acts = torch.randn(16, 7, dtype=dtype).relu()
    decoder, x = torch.randn(7, 5, dtype=dtype) * 3, torch.randn(16, 5, dtype=dtype)
    bias = torch.randn(5, dtype=dtype)

    signals = batch_signals(acts, decoder, x - (acts @ decoder + bias))

    error = (x - acts @ decoder - bias).square().sum(1).mean()
    for i in range(7):
        without = acts.clone()
        without[:, i] = 0
        expected = (x - without @ decoder - bias).square().sum(1).mean() - error
        torch.testing.assert_close(signals.contribution[i], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_contribution_of_a_sae_is_exact(activation, normalization, apply_b_dec, rescale):
    if activation == "batchtopk" and normalization != "none":
        return  # refused: see test_config
    sae = make_sae(
        dtype="float64",
        activation=activation,
        normalize_activations=normalization,
        apply_b_dec_to_input=apply_b_dec,
        rescale_acts_by_decoder_norm=rescale,
        importance_decay=0.0,
    )
    sae.W_dec.data *= torch.rand(24, 1, dtype=torch.float64) * 5 + 0.1
    sae.b_dec.data = torch.randn(8, dtype=torch.float64)
    x = torch.randn(32, 8, dtype=torch.float64) * 3

    acts = sae.training_forward_pass(step_input(x)).feature_acts.to_dense()

    def error(acts):
        sae.encode_with_hidden_pre(x)  # leaves behind what undoes the normalisation
        return (x - sae.decode(acts)).square().sum(1).mean()

    for i in range(24):
        without = acts.clone()
        without[:, i] = 0
        expected = error(without) - error(acts)
        # float32, in which the averages are kept, is the only inexactness
        torch.testing.assert_close(
            sae.tracker.contribution[i].double(), expected, rtol=1e-5, atol=1e-5
        )


# Not so small that float32 itself runs out of numbers.
sizes = st.one_of(st.just(0.0), st.floats(1e-6, 1e3), st.floats(-1e3, -1e-6))


@given(st.lists(sizes, min_size=1, max_size=20), st.integers(-8, 8))
def test_normalize_is_free_of_units_and_finite(values, power):
    signal = torch.tensor(values)
    normal = normalize(signal)
    assert normal.isfinite().all()
    assert (normal >= 0).all()
    torch.testing.assert_close(normalize(signal * 2.0**power), normal, rtol=1e-4, atol=1e-6)
    if (signal > 0).any():
        assert normal.mean().item() == pytest.approx(1, rel=1e-4)


def test_combining_by_hand():
    signals = Signals(torch.tensor([1.0, 3.0]), torch.tensor([0.2, 0.2]), torch.tensor([-5.0, 8.0]))
    # normalised: (0.5, 1.5), (1, 1), (0, 2)
    torch.testing.assert_close(combine_signals(signals), torch.tensor([0.5, 1.5]))
    weighted = combine_signals(signals, (1.0, 0.0, 3.0))
    torch.testing.assert_close(weighted, torch.tensor([0.125, 1.875]))


def test_averages_are_corrected_for_their_own_history():
    tracker = ImportanceTracker(2, decay=0.9)
    ones = Signals(*(torch.ones(2),) * 3)
    tracker.update(ones, torch.ones(2, dtype=torch.bool))
    assert tracker.averages().magnitude.tolist() == pytest.approx([1, 1])
    # Latent 1 is masked now: it keeps its average, and its history.
    tracker.update(Signals(*(torch.tensor([3.0, 0.0]),) * 3), torch.tensor([True, False]))
    expected = (0.09 * 1 + 0.1 * 3) / 0.19
    assert tracker.averages().magnitude.tolist() == pytest.approx([expected, 1])
    assert tracker.weight.tolist() == pytest.approx([0.19, 0.1])
    assert tracker.steps.item() == 2


def test_no_history_is_zero_and_not_nan():
    assert ImportanceTracker(3).averages().magnitude.tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_leaves_the_averages_alone(bad):
    tracker = ImportanceTracker(2, decay=0.9)
    tracker.update(Signals(*(torch.ones(2),) * 3), torch.ones(2, dtype=torch.bool))
    before = {name: b.clone() for name, b in tracker.named_buffers()}
    threes = torch.full((2,), 3.0)
    poisoned = Signals(threes, threes, torch.tensor([bad, 3.0]))
    tracker.update(poisoned, torch.ones(2, dtype=torch.bool))
    for name in (*Signals._fields, "weight"):
        assert tracker.get_buffer(name)[0] == before[name][0]  # the poisoned latent has none of it
        assert tracker.get_buffer(name)[1] != before[name][1]


def test_casting_keeps_the_averages_and_the_counter_exact():
    tracker = ImportanceTracker(3)
    for _ in range(1001):
        tracker.update(Signals(*(torch.rand(3),) * 3), torch.ones(3, dtype=torch.bool))
    before = {name: buffer.clone() for name, buffer in tracker.named_buffers()}
    tracker.to(torch.bfloat16)
    for name, buffer in tracker.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("activation", ["relu", "batchtopk"])
@pytest.mark.parametrize("scale", [0.01, 100])
def test_importance_does_not_depend_on_the_units_of_activations(activation, scale):
    sae, scaled = (make_sae(activation=activation) for _ in range(2))
    scaled.load_state_dict(sae.state_dict())
    scaled.W_dec.data *= scale
    scaled.W_enc.data /= scale
    x = torch.randn(64, 8)
    for each in (sae, scaled):
        each.training_forward_pass(step_input(x))
    torch.testing.assert_close(scaled.importance, sae.importance, rtol=1e-3, atol=1e-4)


def test_statistics_of_bfloat16_are_accumulated_in_float32():
    # bfloat16 has 8 bits: a sum of 4096 of these would stop growing at 256 of them
    acts = torch.full((4096, 1), 1 / 256, dtype=torch.bfloat16)
    signals = batch_signals(acts, torch.ones(1, 1).bfloat16(), torch.zeros(4096, 1).bfloat16())
    assert signals.magnitude.dtype == torch.float32
    assert signals.magnitude.item() == 1 / 256
    assert signals.contribution.item() == pytest.approx(1 / 65536, rel=1e-2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast_leaves_the_state_in_float32_and_the_importance_right(activation):
    sae = make_sae(d_in=32, d_sae=64, activation=activation, importance_decay=0.0)
    x = torch.randn(4096, 32)
    with torch.autocast("cpu", torch.bfloat16):
        sae.training_forward_pass(step_input(x))
    rough = sae.importance
    assert all(b.dtype in (torch.float32, torch.int64) for b in sae.tracker.buffers())
    sae.training_forward_pass(step_input(x))
    torch.testing.assert_close(rough, sae.importance, rtol=0.1, atol=0.02)


def test_importance_mean_is_one_for_sum():
    sae = train(make_sae(), 20)
    assert sae.importance.mean().item() == pytest.approx(1, abs=1e-5)


def test_the_clock_is_read_again_after_whatever_sets_it():
    tracker = ImportanceTracker(2)
    reads = []
    ones = Signals(*(torch.ones(2),) * 3)
    for _ in range(3):
        tracker.update(ones, torch.ones(2, dtype=torch.bool))
        reads.append(tracker.clock())
    tracker.steps.fill_(40)
    reads.append(tracker.clock())
    tracker.load_state_dict({**tracker.state_dict(), "steps": torch.tensor(70)})
    reads.append(tracker.clock())
    tracker.load_state_dict({**tracker.state_dict(), "steps": torch.tensor(80)}, assign=True)
    reads.append(tracker.clock())
    reads.append(copy.deepcopy(tracker).clock())
    tracker.update(ones, torch.ones(2, dtype=torch.bool))
    reads.append(tracker.clock())
    assert reads == [1, 2, 3, 40, 70, 80, 80, 81]


@pytest.mark.parametrize(
    ("importance", "expected"),
    [
        ([2.0, 2.0, 2.0, 2.0], 4),
        ([0.0, 5.0, 0.0], 1),
        ([0.0, 0.0], 2),
        ([3.0, 1.0], 16 / 10),
        ([1e30, 1e30], 2),
        ([7.0], 1),
    ],
)
def test_effective_latents_by_hand(importance, expected):
    assert effective_latents(torch.tensor(importance)).item() == pytest.approx(expected)
