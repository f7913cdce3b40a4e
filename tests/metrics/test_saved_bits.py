import math

import pytest
import torch

from sae_lens_atm.metrics import saved_bits

ROW, NO_BIAS = torch.tensor([[4.0, 0.0]]), torch.zeros(2)
NOISE = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 1.0], [0.0, -1.0]])


def test_one_latent_that_fires_half_of_the_time():
    acts = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    # V = 4 + 1, E = 1 and L0 = .5, so the errors take log2(5 / 1.25) = 2 bits less. Firing takes
    # one bit. The level is always 2: the step is sqrt(6), and the part of the latent is 4 long.
    assert saved_bits(acts @ ROW + NOISE, acts, ROW, NO_BIAS) == pytest.approx(2 - 1)


def test_levels_take_bits():
    acts = torch.tensor([[1.0], [2.0], [0.0], [0.0]])
    # V = 11 + 1. The levels are 2 and 4: one bit, in half of the samples.
    expected = math.log2(12 / 1.25) - 1 - 0.5
    assert saved_bits(acts @ ROW + NOISE, acts, ROW, NO_BIAS) == pytest.approx(expected)
    signed = torch.tensor([[1.0], [-1.0], [0.0], [0.0]])
    expected = math.log2(9 / 1.25) - 1 - 0.5  # V = 8 + 1
    assert saved_bits(signed @ ROW + NOISE, signed, ROW, NO_BIAS) == pytest.approx(expected)


def test_the_bias_is_sent_once():
    acts, bias = torch.tensor([[1.0], [1.0], [0.0], [0.0]]), torch.tensor([3.0, -5.0])
    assert saved_bits(acts @ ROW + bias + NOISE, acts, ROW, bias) == pytest.approx(1)


def test_units_do_not_matter():
    x, acts, rows, bias = torch.randn(50, 3), torch.rand(50, 7), torch.randn(7, 3), torch.randn(3)
    bits = saved_bits(x, acts, rows, bias)
    assert saved_bits(10 * x, acts, 10 * rows, 10 * bias) == pytest.approx(bits, rel=1e-4)
    assert saved_bits(x, 10 * acts, rows / 10, bias) == pytest.approx(bits, rel=1e-4)


def test_nothing_is_saved_if_nothing_fires():
    x = torch.randn(50, 3)
    assert saved_bits(x, torch.zeros(50, 7), torch.randn(7, 3), x.mean(0)) == pytest.approx(0)


def test_it_is_finite_without_error_and_with_a_dense_code():
    x = torch.randn(50, 3)
    assert 0 < saved_bits(x, x, torch.eye(3), NO_BIAS.new_zeros(3)) < 100
    assert math.isfinite(saved_bits(0 * x, 0 * x, torch.eye(3), torch.zeros(3)))


def test_it_is_largest_with_the_true_features():
    acts = torch.where(torch.rand(4000, 24) < 0.1, 1 + torch.rand(4000, 24), 0)
    rows = torch.nn.functional.normalize(torch.randn(24, 16), dim=1)
    x = acts @ rows + 0.1 * torch.randn(4000, 16)
    true = saved_bits(x, acts, rows, torch.zeros(16))
    fewer = acts * (acts < acts.amax(1, keepdim=True))  # the largest is missing
    more = torch.where((acts == 0) & (torch.rand(4000, 24) < 0.05), 0.05, acts)
    assert saved_bits(x, fewer, rows, torch.zeros(16)) < true
    assert saved_bits(x, more, rows, torch.zeros(16)) < true
