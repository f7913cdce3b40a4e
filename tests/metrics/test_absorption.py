import math

import pytest
import torch

from sae_lens_atm.metrics import Absorption, absorption
from tests.metrics.brute_absorption import brute_force

# A parent 0 with children 1 and 2, mutually exclusive, and a feature 3 of its own: orthogonal.
CHILDREN = {0: [1, 2]}
VECTORS = torch.eye(4)
FEATURES = torch.tensor(
    [[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]] * 5
)
NAMES = ("full", "fraction", "recall_gap", "full_learned", "fraction_learned")


def folded(share):
    """A SAE in which the children's latents carry this share of the parent, whose own latent then
    supplies the rest, and is silent where nothing is left."""
    decoder = VECTORS.clone()
    decoder[1:3, 0] = share
    acts = FEATURES.clone()
    acts[:, 0] -= share * FEATURES[:, 1:3].sum(1)
    assert torch.allclose(acts @ decoder, FEATURES @ VECTORS)
    return absorption(acts, FEATURES, decoder, VECTORS, CHILDREN)


def test_an_ideal_sae_scores_zero():
    scores = folded(0.0)
    assert [getattr(scores, name) for name in NAMES] == [0.0] * 5
    assert scores.parents_learned == scores.children_learned == 1
    assert scores.main_latents.tolist() == [[True, False, False, False]]


def test_a_parent_folded_into_each_child_scores_one_wherever_a_child_is():
    scores = folded(1.0)
    # a child is active on half of the parent's samples
    assert scores.full == pytest.approx(0.5)
    assert scores.fraction == pytest.approx(0.5)
    assert scores.recall_gap == pytest.approx(1.0)
    # the children's latents stand at 45 degrees to them: not latents of their own
    assert scores.children_learned == 0
    assert math.isnan(scores.full_learned)


@pytest.mark.parametrize("share", [0.3, 0.4, 0.5, 0.7])
def test_a_partly_folded_parent_scores_its_share(share):
    scores = folded(share)
    assert scores.full == 0
    # below 0.4 of the parent it does not count, by definition
    expected = share if share >= 0.4 else 0.0
    assert scores.fraction == pytest.approx(expected / 2, abs=1e-6)
    assert scores.fraction_learned == pytest.approx(expected, abs=1e-6)


def test_without_a_latent_of_its_own_the_parent_is_absorbed_everywhere():
    decoder = VECTORS[1:].clone()
    decoder[:2, 0] = 1.0
    scores = absorption(FEATURES[:, 1:], FEATURES, decoder, VECTORS, CHILDREN)
    assert scores.full == pytest.approx(0.5)
    assert scores.parents_learned == 0


def test_a_feature_split_is_no_absorption():
    # two latents of the parent's own direction share its samples, whatever the child
    decoder = torch.cat([VECTORS[:1], VECTORS])
    acts = torch.cat([FEATURES[:, :1], FEATURES], 1)
    acts[::2, 0] = 0
    acts[1::2, 1] = 0
    scores = absorption(acts, FEATURES, decoder, VECTORS, CHILDREN)
    assert scores.full == scores.fraction == 0
    assert scores.main_latents.tolist() == [[True, True, False, False, False]]


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_decoder_norms_and_units_do_not_matter(scale):
    decoder = VECTORS.clone()
    decoder[1:3, 0] = 1.0
    acts = FEATURES.clone()
    acts[:, 0] -= FEATURES[:, 1:3].sum(1)
    norms = torch.tensor([[0.5], [2.0], [3.0], [1.0]])
    scores = absorption(
        scale * acts / norms.T, scale * FEATURES, decoder * norms, VECTORS, CHILDREN
    )
    assert scores.full == pytest.approx(0.5)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["positive", "signed", "near the truth"])
def test_agrees_with_brute_force(seed, kind):
    torch.manual_seed(seed)
    features = torch.rand(40, 9) * (torch.rand(40, 9) < 0.4)
    acts = torch.randn(40, 12) * (torch.rand(40, 12) < 0.3)
    acts = acts if kind == "signed" else acts.abs()
    vectors, decoder = torch.randn(9, 5), torch.randn(12, 5)
    if kind == "near the truth":
        decoder[:9] = vectors * torch.rand(9, 1) + 0.2 * torch.randn(9, 5)
        acts[:, :9] = features.where(torch.rand(40, 9) < 0.8, 0.0)
    children = {0: [1, 2], 1: [3, 4], 5: [6]}
    expected = brute_force(*(t.double() for t in (acts, features, decoder, vectors)), children)
    scores = absorption(acts, features, decoder, vectors, children)
    for name in NAMES:
        assert getattr(scores, name) == pytest.approx(expected[name], abs=1e-6, nan_ok=True), name


def test_batches_add_up_and_reset_forgets():
    torch.manual_seed(0)
    features = torch.rand(60, 4) * (torch.rand(60, 4) < 0.5)
    acts = torch.rand(60, 7) * (torch.rand(60, 7) < 0.4)
    decoder = torch.randn(7, 4)
    metric = Absorption(decoder, VECTORS, CHILDREN)
    for rows in (slice(0, 1), slice(1, 40), slice(40, 60)):
        metric.update(acts[rows], features[rows])
    whole = absorption(acts, features, decoder, VECTORS, CHILDREN)
    parts = metric.compute()
    for name in NAMES:
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), nan_ok=True)
    metric.reset()
    with pytest.raises(RuntimeError, match="nothing to measure"):
        metric.compute()


def test_a_silent_sae_and_a_silent_parent():
    scores = absorption(torch.zeros(5, 3), torch.zeros(5, 4), torch.randn(3, 4), VECTORS, CHILDREN)
    assert math.isnan(scores.full)
    scores = absorption(torch.zeros(30, 3), FEATURES, torch.randn(3, 4), VECTORS, CHILDREN)
    assert scores.full == scores.fraction == 0


def test_no_parents_is_an_error():
    with pytest.raises(ValueError, match="children is empty"):
        Absorption(torch.eye(2), torch.eye(2), {})
