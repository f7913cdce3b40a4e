import pytest
import torch

from sae_lens_atm import Signals
from sae_lens_atm.method.sparsity import frequency_weights
from tests.helpers import make_sae, step_input
from tests.method.brute_force import batchtopk, sae_of_uneven_rows


def test_weights_by_hand():
    # s = (1 + 2 + 0 + 6) / (.2 + .5 + 0 + 1) = 9 / 1.7; w = .2 .64, .5 .25, 0, 0; mean .06325
    signals = Signals(
        magnitude=torch.tensor([1.0, 2.0, 0.0, 6.0]),
        frequency=torch.tensor([0.2, 0.5, 0.0, 1.0]),
        contribution=torch.zeros(4),
    )
    expected = 9 / 1.7 * torch.tensor([0.128, 0.125, 0.0, 0.0]) / 0.06325
    torch.testing.assert_close(frequency_weights(signals), expected)


def test_the_weight_is_largest_for_a_latent_that_fires_on_a_third_of_the_inputs():
    frequency = torch.linspace(0, 1, 301)
    weights = frequency_weights(Signals(frequency, frequency, torch.zeros(301)))
    assert weights.argmax() == 100


def test_weights_have_the_scale_of_the_activations():
    signals = Signals(torch.rand(5), torch.rand(5), torch.zeros(5))
    scaled = signals._replace(magnitude=7 * signals.magnitude)
    torch.testing.assert_close(frequency_weights(scaled), 7 * frequency_weights(signals))


def test_no_weights_if_nothing_has_fired():
    assert not frequency_weights(Signals(*torch.zeros(3, 4))).any()


def test_the_loss_in_training_is_its_formula_and_reaches_encoder_and_decoder():
    x = torch.randn(64, 8, dtype=torch.float64)
    for rescaled in (True, False):
        gradients = []
        for kernels in ("auto", "dense"):
            sae = sae_of_uneven_rows(32, 2, rescaled, kernels, frequency_penalty=0.5)
            assert sae.uses_sparse_kernels(x) == (kernels == "auto")
            sae.training_forward_pass(step_input(x))
            weights = frequency_weights(sae.tracker.averages())
            assert weights.any()
            loss = sae.training_forward_pass(step_input(x)).losses["frequency_loss"]
            acts, lengths = batchtopk(sae, x)
            expected = 0.5 * ((acts * lengths).mean(0) @ weights.double())
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)

            parameters = (sae.W_enc, sae.W_dec, sae.b_enc)
            gradients.append(torch.autograd.grad(loss, parameters))
            torch.testing.assert_close(
                gradients[-1], torch.autograd.grad(expected, parameters), rtol=1e-6, atol=1e-9
            )
            assert all(gradient.any() for gradient in gradients[-1])


@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
def test_the_loss_has_the_unit_of_the_error(normalization):
    x, ratios = torch.randn(64, 8, dtype=torch.float64), []
    for scale in (1, 1000):
        torch.manual_seed(0)
        sae = make_sae(
            dtype="float64",
            activation="relu",
            normalize_activations=normalization,
            frequency_penalty=1.0,
        )
        sae.training_forward_pass(step_input(scale * x))
        losses = sae.training_forward_pass(step_input(scale * x)).losses
        ratios.append(losses["frequency_loss"] / losses["mse_loss"])
    torch.testing.assert_close(*ratios, rtol=1e-3, atol=0)


def test_the_loss_ends_at_its_step():
    for end, last in ((0.6, 5), (1.0, 9)):
        sae = make_sae(schedule_steps=10, frequency_penalty=0.5, frequency_penalty_end=end)
        x = torch.randn(64, 8)
        for step in range(10):
            losses = sae.training_forward_pass(step_input(x, step=step)).losses
            assert ("frequency_loss" in losses) == (step <= last), step


def test_no_loss_without_penalty():
    sae = make_sae(frequency_penalty=0.0)
    x = torch.randn(64, 8)
    assert "frequency_loss" not in sae.training_forward_pass(step_input(x)).losses
