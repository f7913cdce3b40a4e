import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_lens_atm import importance_threshold, mask_probability, sample_mask, uniform_at
from sae_lens_atm.method.masking import ramp

# Not so small that float32 itself runs out of numbers.
sizes = st.one_of(st.just(0.0), st.floats(1e-4, 1e4))
importances = st.lists(sizes, min_size=1, max_size=30).map(torch.tensor)
thresholds = st.floats(-10, 1e4, width=32).map(torch.tensor)
rates = st.floats(0, 20)


def test_threshold_by_hand():
    importance = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3, population variance 3.5
    assert importance_threshold(importance, 0).item() == 3
    assert importance_threshold(importance, -2).item() == pytest.approx(3 - 2 * math.sqrt(3.5))


def test_probability_by_hand():
    p = mask_probability(torch.tensor([0.0, 1.0, 2.0, 5.0]), torch.tensor(2.0), 1.5)
    expected = [1 - math.exp(-1.5), 1 - math.exp(-0.75), 0, 0]
    assert p.tolist() == pytest.approx(expected)


@given(importances, thresholds, rates)
def test_probability_is_one_and_zero_where_it_must_be(importance, threshold, r):
    p = mask_probability(importance, threshold, r)
    assert ((p >= 0) & (p <= 1)).all()
    assert (p[importance >= threshold] == 0).all()
    assert (p <= -math.expm1(-r) + 1e-6).all()
    if r == 0 or threshold <= 0:
        assert (p == 0).all()


@given(importances, thresholds, rates)
def test_probability_falls_with_importance(importance, threshold, r):
    ordered = importance.sort().values
    p = mask_probability(ordered, threshold, r)
    assert (p.diff() <= 1e-6).all()


@given(importances, st.floats(-2, 3), rates, st.integers(-10, 10))
def test_probability_does_not_change_when_importance_is_rescaled(importance, c, r, power):
    scaled = importance * 2.0**power
    before, after = (
        mask_probability(i, importance_threshold(i, c), r) for i in (importance, scaled)
    )
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("c", [0, 1, -1])
@pytest.mark.parametrize("importance", [[2.0, 2.0, 2.0], [0.0, 0.0], [7.0]])
def test_equal_importances_and_a_single_latent_are_not_masked(importance, c):
    importance = torch.tensor(importance)
    p = mask_probability(importance, importance_threshold(importance, c), 1.0)
    assert p.tolist() == [0] * len(importance)


@given(
    st.one_of(
        importances,
        st.builds(torch.full, st.tuples(st.integers(1, 20)), sizes),
        st.integers(1, 20).map(lambda n: torch.eye(n)[0]),
        st.integers(1, 20).map(torch.zeros),
    ),
    st.floats(-100, 1e6),
    st.floats(0, 1e6),
    st.integers(0, 2**31),
)
def test_the_most_important_latent_is_never_masked(importance, c, r, step):
    p = mask_probability(importance, importance_threshold(importance, c), r)
    assert (p[importance == importance.max()] == 0).all()
    for uniform in (uniform_at(torch.tensor(step), 0, 0, importance.shape), torch.zeros(len(p))):
        assert sample_mask(p, uniform)[importance.argmax()]


def test_far_above_all_others_are_masked_with_the_papers_probability():
    importance = torch.tensor([1.0, 2.0, 3.0])
    p = mask_probability(importance, importance_threshold(importance, 1e6), 1.0)
    assert p.tolist() == pytest.approx([1 - math.exp(-1), 1 - math.exp(-1), 0], abs=1e-5)


def test_sampling_keeps_with_one_minus_p():
    p = torch.tensor([0.0, 0.3, 1.0])
    uniform = torch.tensor([0.0, 0.29, 0.999])
    assert sample_mask(p, uniform).tolist() == [True, False, False]
    assert sample_mask(p, torch.tensor([0.5, 0.3, 0.0])).tolist() == [True, True, False]


def test_a_draw_that_masks_everything_masks_nothing():
    assert sample_mask(torch.ones(4), torch.zeros(4)).all()
    per_sample = sample_mask(torch.tensor([0.5, 0.5]), torch.tensor([[0.0, 0.0], [0.9, 0.0]]))
    assert per_sample.tolist() == [[True, True], [True, False]]


def test_ramp_by_hand():
    at = [ramp(torch.tensor(step), 4).item() for step in (0, 1, 3, 4, 99)]
    assert at == [0, 0.25, 0.75, 1, 1]
    assert [ramp(torch.tensor(step), 0).item() for step in (0, 9)] == [1, 1]


def test_hash_agrees_with_its_definition_in_32_bits():
    # the published function, with C's unsigned overflow, on one chain by hand
    def lowbias(x):
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32
        x ^= x >> 15
        x = x * 0x735A2D97 % 2**32
        return x ^ (x >> 15)

    seed, stream, step = 7, 3, 123_456
    key = lowbias(lowbias(lowbias(seed) ^ stream) ^ step)
    expected = [(lowbias(lowbias(i) ^ key) >> 8) / 2**24 for i in range(50)]
    assert uniform_at(torch.tensor(step), seed, stream, (50,)).tolist() == expected


@pytest.mark.parametrize("vary", ["step", "seed", "stream", "index"])
def test_uniform_numbers_are_uniform_and_unrelated(vary):
    n = 4096
    base = {"step": 5, "seed": 0, "stream": 0}

    def draw(**changed):
        at = {**base, **changed}
        return uniform_at(torch.tensor(at["step"]), at["seed"], at["stream"], (n,))

    if vary == "index":
        u, v = draw()[:-1], draw()[1:]
    else:
        u, v = draw(), draw(**{vary: 6})
    for sample in (u, v):
        assert sample.min() >= 0
        assert sample.max() < 1
        counts = torch.histc(sample, 64, 0, 1)
        chi_squared = ((counts - n / 64) ** 2 / (n / 64)).sum().item()
        assert 20 < chi_squared < 130  # 63 degrees of freedom: beyond 1e-6 on either side
    correlation = torch.corrcoef(torch.stack([u, v]))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(n)


def test_each_latent_is_uniform_over_steps():
    draws = torch.stack([uniform_at(torch.tensor(t), 0, 0, (16,)) for t in range(4000)])
    assert (draws.mean(0) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / 4000)


def test_drawing_touches_no_global_random_state():
    before = torch.get_rng_state()
    uniform_at(torch.tensor(1), 0, 0, (8,))
    assert torch.equal(torch.get_rng_state(), before)
