import math

import pytest
import torch

from sae_lens_atm.metrics.description_length import BINS, code_length, description_length, levels


def length(acts, bins=4):
    return code_length(levels(acts, bins)[0], bins)


def test_levels_and_their_middles():
    acts = torch.tensor([[8.0, 0.0], [1.9, -4.0], [0.0, 4.0], [2.1, 0.1]])
    level, rounded = levels(acts, 4)
    assert level.tolist() == [[4, 0], [1, -4], [0, 4], [2, 1]]
    assert rounded.tolist() == [[7, 0], [1, -3.5], [0, 3.5], [3, 0.5]]


def test_a_latent_with_four_equal_levels_half_of_the_time():
    acts = torch.tensor([[0.0]] * 4 + [[1.0], [2.0], [3.0], [4.0]])
    assert length(acts) == pytest.approx(1 + 0.5 * 2)


def test_a_latent_that_always_fires_alike_takes_no_bits():
    assert length(torch.full((10, 1), 3.0)) == 0
    assert length(torch.zeros(10, 3)) == 0


def test_the_sign_is_a_bit():
    assert length(torch.tensor([[1.0], [-1.0]])) == pytest.approx(1)


def test_it_is_that_of_the_slow_version():
    acts = (torch.randn(500, 7) - 0.3).relu()
    total = 0.0
    for column in acts.T:
        fired = column[column > 0]
        p = len(fired) / len(column)
        total += -p * math.log2(p) - (1 - p) * math.log2(1 - p)
        counts = torch.histogram(fired, bins=8, range=(0.0, float(fired.max()))).hist
        shares = counts[counts > 0] / counts.sum()
        total += p * float(-(shares * shares.log2()).sum())
    assert length(acts, 8) == pytest.approx(total, rel=1e-3)


def test_the_fewest_bins_that_still_reconstruct():
    acts = 1 + torch.rand(1000, 4)
    coarse = description_length(acts, acts, lambda z: z)
    # Rounding to n bins of width w adds w^2 / 12; the variance is 1 / 12, so w must be at most .1.
    assert coarse == pytest.approx(length(acts, 32), rel=1e-6)
    poor = description_length(acts, acts, lambda z: 0 * z)
    assert poor == pytest.approx(length(acts, BINS[0]), rel=1e-6)


def test_more_active_latents_take_more_bits():
    x = torch.randn(2000, 32)
    found = []
    for k in (2, 4, 8):
        kept = x.topk(k, dim=1)
        acts = torch.zeros_like(x).scatter(1, kept.indices, kept.values.relu())
        found.append(description_length(acts, x, lambda z: z))
    assert found[0] < found[1] < found[2]


def test_float16_does_not_overflow():
    decoder = torch.randn(6, 4)
    acts = 300 * torch.randn(400, 6).relu()
    x = acts @ decoder
    lengths = [
        description_length(acts.to(dtype), x.to(dtype), lambda a, t=dtype: (a @ decoder).to(t))
        for dtype in (torch.float32, torch.float16)
    ]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.02)
