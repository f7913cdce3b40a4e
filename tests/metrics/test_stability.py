import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sae_lens_atm.metrics import Stability, stability
from tests.metrics.brute_stability import brute_force

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 40)


def directions(n, d_in, seed):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("seed", range(15))
def test_agrees_with_brute_force(seed, signed):
    torch.manual_seed(seed)
    a, b = torch.randn(int(torch.randint(1, 7, ())), 3), torch.randn(6, 3)
    alive_a, alive_b = torch.rand(len(a)) < 0.8, torch.rand(len(b)) < 0.8
    expected = brute_force(a, b, alive_a, alive_b, signed)
    actual = stability(a, b, alive_a, alive_b, signed)
    assert actual == pytest.approx(expected, abs=1e-6, nan_ok=True)


@given(sizes, sizes, st.integers(1, 8), seeds, st.booleans())
@hypothesis_settings(max_examples=30)
def test_symmetric_and_within_bounds(n_a, n_b, d_in, seed, signed):
    a, b = directions(n_a, d_in, seed), directions(n_b, d_in, seed ^ 1)
    score = stability(a, b, signed=signed)
    assert score == pytest.approx(stability(b, a, signed=signed), abs=1e-6)
    assert (0 if signed else -1) <= score <= 1
    assert stability(a, b, signed=True) >= score - 1e-6


@given(sizes, st.integers(1, 8), seeds)
@hypothesis_settings(max_examples=30)
def test_a_dictionary_permuted_and_rescaled_is_the_same(n, d_in, seed):
    a = directions(n, d_in, seed)
    torch.manual_seed(seed)
    b = a[torch.randperm(n)] * (0.1 + 10 * torch.rand(n, 1))
    assert 1 - 1e-6 < stability(a, b) <= 1


def test_orthogonal_dictionaries_share_nothing():
    basis = torch.linalg.qr(torch.randn(8, 8)).Q
    assert stability(basis[:4], basis[4:]) == pytest.approx(0.0, abs=1e-6)


def test_half_a_dictionary_shared_is_a_half():
    assert stability(torch.eye(6)[:4], torch.eye(6)[2:]) == pytest.approx(0.5)


def test_the_sum_is_largest_and_not_each_cosine_in_turn():
    # a_0: 0.96, 0.8; a_1: 0.936, 0.28. Greedily, 0.96 comes first and leaves 0.28: mean 0.62.
    a = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    b = torch.tensor([[0.96, 0.28], [0.8, -0.6]])
    assert stability(a, b) == pytest.approx((0.8 + 0.936) / 2)


def test_no_latent_is_matched_twice():
    # both rows of a are e_0, of which b has one
    assert stability(torch.eye(3)[[0, 0]], torch.eye(3)[[0, 1]]) == pytest.approx(0.5)


def test_dead_latents_do_not_count():
    a, b = torch.eye(4), torch.eye(4)
    b[2:] = torch.tensor([[1.0, 1, 1, 1], [-1, 2, 0, 1]])
    assert stability(a, b) < 0.9
    alive = torch.tensor([True, True, False, False])
    assert stability(a, b, alive, alive) == pytest.approx(1.0)
    # not even to be matched with, and firing counts will do for a mask
    assert stability(a, b, ~alive, torch.tensor([7, 2, 0, 0])) == pytest.approx(0.0)
    b[3] = math.nan
    assert stability(a, b, alive_b=alive) == pytest.approx(1.0)


def test_few_alive_latents_score_what_is_found_again():
    few = torch.tensor([True, False, False, False])
    assert stability(torch.eye(4), torch.eye(4)[[3, 2, 1, 0]], few) == pytest.approx(1.0)
    metric = Stability()
    metric.update(torch.eye(4), few)
    metric.update(torch.eye(4))
    assert metric.compute().alive_share.tolist() == [0.25, 1.0]


def test_signed_takes_a_direction_and_its_opposite_for_one():
    a = torch.randn(20, 12)
    b = a[torch.randperm(20)] * torch.randn(20, 1)  # of either sign
    assert stability(a, b, signed=True) == pytest.approx(1.0, abs=1e-6)
    assert stability(a, b) < 0.9
    assert stability(torch.eye(3), -torch.eye(3)) == 0.0
    assert stability(torch.ones(1, 3), -torch.ones(1, 3)) == pytest.approx(-1.0)


@pytest.mark.parametrize("signed", [False, True])
def test_all_pairs_of_several_saes(signed):
    decoders = [directions(n, 6, seed) for seed, n in enumerate((5, 7, 7, 9))]
    alive = [torch.arange(len(decoder)) % 3 != 0 for decoder in decoders]
    metric = Stability(signed=signed)
    for decoder, mask in zip(decoders, alive, strict=True):
        metric.update(decoder, mask)
    scores = metric.compute()
    pairs = []
    for i in range(4):
        assert math.isnan(scores.by_pair[i, i])
        for j in range(i):
            expected = stability(decoders[i], decoders[j], alive[i], alive[j], signed)
            assert scores.by_pair[i, j] == pytest.approx(expected)
            assert scores.by_pair[j, i] == scores.by_pair[i, j]
            pairs.append(expected)
    assert scores.mean == pytest.approx(sum(pairs) / 6)
    assert scores.sd == pytest.approx(
        math.sqrt(sum((value - scores.mean) ** 2 for value in pairs) / 5)
    )
    assert scores.alive_share.tolist() == pytest.approx([3 / 5, 4 / 7, 4 / 7, 6 / 9])
    with pytest.raises(FrozenInstanceError):
        scores.mean = 0.0


def test_one_pair_has_no_spread():
    metric = Stability()
    metric.update(torch.eye(3))
    metric.update(torch.eye(3))
    scores = metric.compute()
    assert scores.mean == 1
    assert math.isnan(scores.sd)


def test_an_update_keeps_nothing_of_the_sae():
    decoder = torch.nn.Parameter(torch.eye(3, dtype=torch.bfloat16))
    metric = Stability()
    metric.update(decoder)
    with torch.no_grad():
        decoder.zero_()  # as training goes on
    metric.update(torch.eye(3))
    assert metric.compute().mean == 1


def test_a_dead_sae_makes_the_mean_nan():
    dead = torch.zeros(3, dtype=torch.bool)
    assert math.isnan(stability(torch.eye(3), torch.eye(3), dead))
    assert math.isnan(stability(torch.eye(3), torch.eye(3), None, dead))
    metric = Stability()
    for alive in (None, None, dead):
        metric.update(torch.eye(3), alive)
    scores = metric.compute()
    assert math.isnan(scores.mean)
    assert scores.by_pair[0, 1] == 1
    assert scores.alive_share.tolist() == [1, 1, 0]


def test_large_dictionaries_are_taken_in_pieces():
    a = directions(2100, 4, 0)
    assert stability(a, a.flip(0)) == pytest.approx(1.0)


def test_fewer_than_two_saes_and_reset():
    metric = Stability()
    with pytest.raises(RuntimeError, match=r"after 0 update.*at least two"):
        metric.compute()
    metric.update(torch.eye(3))
    with pytest.raises(RuntimeError, match=r"after 1 update.*at least two"):
        metric.compute()
    metric.update(torch.eye(3))
    metric.compute()
    metric.reset()
    metric.update(torch.eye(5))  # not held against what was forgotten
    with pytest.raises(RuntimeError, match="after 1 update"):
        metric.compute()


def test_what_cannot_be_compared_is_named():
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 5\).*d_in"):
        stability(torch.randn(4, 3), torch.randn(4, 5))
    metric = Stability()
    metric.update(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(6, 5\).*d_in"):
        metric.update(torch.randn(6, 5))
    metric.update(torch.randn(4, 3))
    assert metric.compute().by_pair.shape == (2, 2)  # what was refused was not taken in
    with pytest.raises(ValueError, match=r"shape \(3,\).*\(latents, d_in\)"):
        metric.update(torch.randn(3))
    with pytest.raises(ValueError, match=r"alive has shape \(2,\), it must be \(4,\)"):
        metric.update(torch.randn(4, 3), torch.ones(2))
    with pytest.raises(ValueError, match="not finite"):
        metric.update(torch.tensor([[1.0, math.inf]]))
