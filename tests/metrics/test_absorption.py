import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sae_lens_atm.metrics import Absorption, absorption
from tests.metrics.brute_absorption import brute_force

# A parent 0 with children 1 and 2, mutually exclusive, and a feature 3 of its own: orthogonal.
CHILDREN = {0: [1, 2]}
VECTORS = torch.eye(4)
FEATURES = torch.tensor(
    [[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]] * 5
)
NAMES = ("full", "fraction", "recall_gap", "full_learned", "fraction_learned")
LEARNED = ("parents_learned", "children_learned")

# Parents 0 and 1 with children 2 to 4 and 5 to 6, and a feature 7 of its own: orthogonal as well.
FAMILIES = {0: [2, 3, 4], 1: [5, 6]}


def families(seed):
    """Samples of `FAMILIES`: parents of any strength, beside one child, as strong, or none."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.zeros(1000, 8)
    for parent, children in FAMILIES.items():
        strength = 0.5 + torch.rand(1000, generator=generator)
        features[:, parent] = strength * (torch.rand(1000, generator=generator) < 0.2)
        choice = torch.randint(len(children) + 1, (1000,), generator=generator)
        for position, child in enumerate(children):
            features[:, child] = features[:, parent] * (choice == position)
    features[:, 7] = torch.rand(1000, generator=generator) < 0.05
    return features


def carry(features, children, share):
    """Activations and unit decoder of a SAE whose children's latents carry this share of their
    parent, whose own latent supplies the rest, and is silent where nothing is left."""
    decoder = torch.eye(features.shape[1])
    acts = features.clone()
    for parent, members in children.items():
        decoder[members, parent] = share
        acts[:, parent] -= share * features[:, members].sum(1)
    assert torch.allclose(acts @ decoder, features)
    norms = decoder.norm(dim=1)
    return acts * norms, decoder / norms.unsqueeze(1)


def beside_a_child(features, children):
    """Share of each parent's samples on which one of its children is active."""
    return torch.tensor(
        [
            (features[features[:, parent] > 0][:, members] > 0).any(1).double().mean()
            for parent, members in children.items()
        ]
    )


def assert_same(actual, expected):
    for name in (*NAMES, *LEARNED):
        assert getattr(actual, name) == pytest.approx(
            getattr(expected, name), abs=1e-6, nan_ok=True
        ), name
    assert torch.equal(actual.main_latents, expected.main_latents)
    for name in ("full_by_parent", "fraction_by_parent"):
        values = getattr(actual, name), getattr(expected, name)
        torch.testing.assert_close(*values, atol=1e-6, rtol=0, equal_nan=True)


def folded(share):
    acts, decoder = carry(FEATURES, CHILDREN, share)
    return absorption(acts, FEATURES, decoder, VECTORS, CHILDREN)


def families_folded(share, seed):
    """The scores, and the share of each parent's samples beside a child."""
    features = families(seed)
    acts, decoder = carry(features, FAMILIES, share)
    scores = absorption(acts, features, decoder, torch.eye(8), FAMILIES)
    return scores, beside_a_child(features, FAMILIES)


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


@pytest.mark.parametrize("seed", range(3))
def test_families_by_an_ideal_sae(seed):
    scores, _ = families_folded(0.0, seed)
    assert [getattr(scores, name) for name in NAMES] == [0.0] * 5
    assert scores.parents_learned == scores.children_learned == 1


@pytest.mark.parametrize("seed", range(3))
def test_families_with_the_parents_folded_into_their_children(seed):
    # Full and fraction are 1 beside a child and 0 elsewhere, where the parent's own latent fires.
    scores, beside = families_folded(1.0, seed)
    assert 0.5 < beside.min() < beside.max() < 1
    torch.testing.assert_close(scores.full_by_parent, beside)
    torch.testing.assert_close(scores.fraction_by_parent, beside)
    assert scores.full == scores.fraction == pytest.approx(beside.mean().item())
    assert scores.recall_gap == 1
    assert scores.children_learned == 0


@pytest.mark.parametrize("seed", range(3))
def test_families_with_the_parents_half_folded(seed):
    # Beside a child, of strength m as its parent: t = m, the parent's latent contributes
    # main = m - m / 2, the child's m / 2 >= 0.4 t, so A = min(m / 2, t - main) = m / 2 and
    # A / (A + main) = 1 / 2. Elsewhere main = t: 0. Nowhere is the main latent silent: full is 0,
    # and so is the recall gap. The children's cosines are 1 / sqrt(1.25) = 0.89: learned.
    scores, beside = families_folded(0.5, seed)
    torch.testing.assert_close(scores.fraction_by_parent, beside / 2)
    assert scores.fraction == pytest.approx(beside.mean().item() / 2)
    assert scores.fraction_learned == pytest.approx(0.5)
    assert scores.full == scores.full_learned == scores.recall_gap == 0
    assert scores.children_learned == 1


@pytest.mark.parametrize("seed", range(3))
def test_families_with_every_parent_split_in_two(seed):
    features = families(seed)
    first = (torch.rand(1000, 2) < 0.5) * features[:, :2]
    acts = torch.cat([first, features[:, :2] - first, features[:, 2:]], 1)
    decoder = torch.eye(8)[[0, 1, 0, 1, *range(2, 8)]]
    scores = absorption(acts, features, decoder, torch.eye(8), FAMILIES)
    assert [getattr(scores, name) for name in NAMES] == [0.0] * 5
    assert scores.main_latents.nonzero().tolist() == [[0, 0], [0, 2], [1, 1], [1, 3]]


@pytest.mark.parametrize("seed", range(3))
def test_a_sae_that_learned_no_children_absorbs_nothing(seed):
    features = families(seed)
    kept = [0, 1, 7]
    scores = absorption(features[:, kept], features, torch.eye(8)[kept], torch.eye(8), FAMILIES)
    assert scores.full == scores.fraction == scores.recall_gap == 0
    assert math.isnan(scores.full_learned)
    assert math.isnan(scores.fraction_learned)
    assert scores.children_learned == 0
    assert scores.parents_learned == 1


def test_a_random_sae_carries_no_parent():
    # In 1024 dimensions no two of a few random directions come near a cosine of 0.4 / 3.
    features = families(0)
    acts = torch.rand(1000, 50) * (torch.rand(1000, 50) < 0.1)
    vectors = torch.nn.functional.pad(torch.eye(8), (0, 1016))
    decoder = torch.nn.functional.normalize(torch.randn(50, 1024), dim=1)
    scores = absorption(acts, features, decoder, vectors, FAMILIES)
    assert scores.full == scores.fraction == 0
    assert scores.parents_learned == scores.children_learned == 0
    assert abs(scores.recall_gap) < 0.2


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


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("cosine", "full", "fraction"), [(0.02, 0, 0), (0.03, 0.5, 0), (0.09, 0.5, 0), (0.11, 0.5, 0.5)]
)
def test_how_near_an_absorber_must_be(cosine, full, fraction, sign):
    # The children's latents carry all of the parent, at a small cosine by a large activation.
    decoder = VECTORS.clone()
    decoder[1:3, 0] = cosine
    decoder[1:3, 1:3] *= math.sqrt(1 - cosine**2)
    acts, _ = carry(FEATURES, CHILDREN, 1.0)
    acts[:, 1:3] = FEATURES[:, 1:3] / cosine
    acts[:, 1:3] *= sign
    decoder[1:3] *= sign
    scores = absorption(acts, FEATURES, decoder, VECTORS, CHILDREN)
    assert (scores.full, scores.fraction) == (full, fraction)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_decoder_norms_and_units_do_not_matter(scale):
    acts, decoder = carry(FEATURES, CHILDREN, 1.0)
    norms = torch.tensor([[0.5], [2.0], [3.0], [1.0]])
    scores = absorption(
        scale * acts / norms.T, scale * FEATURES, decoder * norms, VECTORS, CHILDREN
    )
    assert scores.full == pytest.approx(0.5)


def random_case(seed, kind):
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    features = uniform(40, 9) * (uniform(40, 9) < 0.4)
    acts = normal(40, 12) * (uniform(40, 12) < 0.3)
    vectors, decoder = normal(9, 5), normal(12, 5)
    if "near the truth" in kind:
        decoder[:9] = vectors * uniform(9, 1) + 0.2 * normal(9, 5)
        acts[:, :9] = features.where(uniform(40, 9) < 0.8, 0.0)
    if "flipped" in kind:
        acts, decoder = flipped(acts, decoder, generator)
    return acts if "signed" in kind else acts.abs(), features, decoder, vectors


def flipped(acts, decoder, generator=None):
    """The same SAE with the signs of some latents, decoder row and activations, turned."""
    sign = 1 - 2 * torch.randint(2, (len(decoder),), generator=generator)
    return acts * sign, decoder * sign.unsqueeze(1)


RANDOM_CHILDREN = {0: [1, 2], 1: [3, 4], 5: [6]}
KINDS = ["positive", "signed", "near the truth", "signed, near the truth, flipped"]
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signed", [False, True])
def test_agrees_with_brute_force(seed, kind, signed):
    case = random_case(seed, kind)
    expected = brute_force(*(t.double() for t in case), RANDOM_CHILDREN, signed)
    scores = absorption(*case, RANDOM_CHILDREN, signed)
    for name in NAMES:
        assert getattr(scores, name) == pytest.approx(expected[name], abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_sign_of_a_latent_does_not_matter_to_signed(share, seed):
    features = families(seed)
    acts, decoder = carry(features, FAMILIES, share)
    plain = absorption(acts, features, decoder, torch.eye(8), FAMILIES)
    turned = flipped(acts, decoder)
    assert (turned[0] < 0).any()
    scores = absorption(turned[0], features, turned[1], torch.eye(8), FAMILIES, signed=True)
    assert_same(scores, plain)


def test_unsigned_a_row_turned_around_is_not_learned_but_absorbs():
    features = families(0)
    acts, decoder = carry(features, FAMILIES, 0.5)
    scores = absorption(-acts, features, -decoder, torch.eye(8), FAMILIES)
    assert scores.parents_learned == scores.children_learned == 0
    assert scores.fraction == pytest.approx(beside_a_child(features, FAMILIES).mean().item() / 2)


@given(seeds, st.sampled_from(KINDS))
@hypothesis_settings(max_examples=30)
def test_signed_and_random_saes(seed, kind):
    acts, features, decoder, vectors = random_case(seed, kind)
    plain = absorption(acts, features, decoder, vectors, RANDOM_CHILDREN, signed=True)
    acts, decoder = flipped(acts, decoder, torch.Generator().manual_seed(seed ^ 1))
    scores = absorption(acts, features, decoder, vectors, RANDOM_CHILDREN, signed=True)
    assert_same(scores, plain)


@pytest.mark.parametrize(("signed", "main"), [(False, 0), (True, 1)])
def test_of_equal_detectors_the_nearest_is_main(signed, main):
    # The second latent writes the parent exactly, from an opposite row.
    decoder = torch.tensor([[0.6, 0.8, 0, 0], [-1, 0, 0, 0]])
    acts = FEATURES[:, :1] * torch.tensor([0.5, -1.0])
    scores = absorption(acts, FEATURES, decoder, VECTORS, CHILDREN, signed=signed)
    assert scores.main_latents.nonzero().tolist() == [[0, main]]


@given(seeds, st.sampled_from(KINDS), st.lists(st.integers(0, 40), max_size=4))
@hypothesis_settings(max_examples=40)
def test_neither_batches_nor_the_order_of_samples_matter(seed, kind, cuts):
    acts, features, decoder, vectors = random_case(seed, kind)
    whole = absorption(acts, features, decoder, vectors, RANDOM_CHILDREN)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    metric = Absorption(decoder, vectors, RANDOM_CHILDREN)
    for rows in order.tensor_split(sorted(cuts)):
        metric.update(acts[rows], features[rows])
    assert_same(metric.compute(), whole)


def test_reset_forgets():
    metric = Absorption(torch.eye(4), VECTORS, CHILDREN)
    metric.update(FEATURES, FEATURES)
    metric.reset()
    with pytest.raises(RuntimeError, match="update"):
        metric.compute()
    acts, decoder = carry(FEATURES, CHILDREN, 1.0)
    metric = Absorption(decoder, VECTORS, CHILDREN)
    metric.update(FEATURES, FEATURES)
    metric.reset()
    metric.update(acts, FEATURES)
    assert_same(metric.compute(), absorption(acts, FEATURES, decoder, VECTORS, CHILDREN))


def test_a_silent_sae_and_a_silent_parent():
    scores = absorption(torch.zeros(5, 3), torch.zeros(5, 4), torch.randn(3, 4), VECTORS, CHILDREN)
    assert math.isnan(scores.full)
    features = families(0)
    acts, decoder = carry(features, FAMILIES, 1.0)
    features[:, [1, 5, 6]] = 0
    scores = absorption(acts, features, decoder, torch.eye(8), FAMILIES)
    assert scores.full == scores.full_by_parent[0] > 0.5
    assert scores.fraction == scores.fraction_by_parent[0] > 0.5
    assert math.isnan(scores.full_by_parent[1])
    scores = absorption(torch.zeros(30, 3), FEATURES, torch.randn(3, 4), VECTORS, CHILDREN)
    assert scores.full == scores.fraction == 0


def test_no_parents_is_an_error():
    with pytest.raises(ValueError, match="children is empty"):
        Absorption(torch.eye(2), torch.eye(2), {})


def test_a_child_of_two_parents_is_refused():
    with pytest.raises(ValueError, match="feature 2 under 0 and under 3: a feature must have"):
        Absorption(torch.eye(4), torch.eye(4), {0: [1, 2], 3: [2]})


@pytest.mark.parametrize("children", [{0: [0]}, {0: [1], 1: [2], 2: [0]}])
def test_a_cycle_is_refused(children):
    with pytest.raises(ValueError, match="cycle"):
        Absorption(torch.eye(3), torch.eye(3), children)


@pytest.mark.parametrize("children", [{0: [3]}, {-1: [0]}])
def test_a_feature_out_of_range_is_refused(children):
    with pytest.raises(ValueError, match=r"children has the feature (3|-1)"):
        Absorption(torch.eye(3), torch.eye(3), children)


def test_a_decoder_of_another_width_is_refused():
    with pytest.raises(ValueError, match="decoder has shape"):
        Absorption(torch.eye(4), torch.eye(3), {0: [1]})


@pytest.mark.parametrize(
    ("acts", "features"),
    [
        (torch.zeros(5, 3), torch.zeros(4, 3)),
        (torch.zeros(5, 2), torch.zeros(5, 3)),
        (torch.zeros(5, 3), torch.full((5, 3), math.nan)),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(acts, features):
    metric = Absorption(torch.eye(3), torch.eye(3), {0: [1]})
    with pytest.raises(ValueError, match="acts"):
        metric.update(acts, features)
