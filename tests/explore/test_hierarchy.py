import numpy as np
import pytest
import torch

from sae_lens_atm.explore.examples import Amount
from sae_lens_atm.explore.hierarchy import (
    ABSORBED,
    MISSED,
    TOGETHER,
    describe_pairs,
    find_pair_examples,
    implied_pairs,
    is_absorbed,
)
from tests.explore.sample import reading_of

PARENT, CHILD, OTHER = 0, 1, 2
NO = -1


@pytest.fixture
def absorbing():
    """On 40 of 1000 rows the parent's feature is there; on 10 of these, the child's, too.

    On 8 of the 10, the child's latent writes both features, and the parent's latent is silent.
    """
    acts = np.zeros((1000, 3))
    acts[:32, PARENT] = 1
    acts[30:40, CHILD] = 1
    acts[500:520, OTHER] = 1
    decoder = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 1]])
    return reading_of(acts, decoder)


def parents(*of_latents):
    return np.array(of_latents, dtype=np.int64)


def test_the_parent_is_found_although_it_is_silent(absorbing):
    found = implied_pairs(absorbing, torch.tensor([2.0, 1, 1]))
    assert found[CHILD][found[CHILD] >= 0].tolist() == [PARENT]
    assert (found[PARENT] < 0).all()  # the child is less important
    assert (found[OTHER] < 0).all()


def test_a_dense_latent_is_no_parent():
    acts = np.zeros((100, 2))
    acts[:20, 0] = acts[:5, 1] = 1
    found = implied_pairs(reading_of(acts), torch.tensor([2.0, 1]))
    assert (found < 0).all()


def test_the_figures_of_a_pair(absorbing):
    found = describe_pairs(absorbing, parents([NO], [PARENT], [NO]), choose=True)
    assert (found.child.tolist(), found.parent.tolist()) == ([CHILD], [PARENT])
    assert found.cosine[0] == pytest.approx(2**-0.5)
    assert found.together[0] == pytest.approx(0.2)
    assert found.lift[0] == pytest.approx(0.2 / 0.032)
    assert found.absorbed[0] == pytest.approx(0.8)


def test_pairs_that_have_nothing_in_common_are_left_out(absorbing):
    unrelated = parents([NO], [NO], [PARENT])
    assert len(describe_pairs(absorbing, unrelated, choose=True).child) == 0
    kept = describe_pairs(absorbing, unrelated, choose=False)  # ATM has found it
    assert (kept.child.tolist(), kept.together.tolist(), kept.absorbed.tolist()) == ([2], [0], [0])


def test_a_child_keeps_its_clearest_parents():
    acts = np.ones((20, 12))
    acts[:, 1] = np.arange(20) < 10
    candidates = np.full((12, 11), NO)
    candidates[0] = np.arange(1, 12)
    found = describe_pairs(reading_of(acts), candidates, choose=False)
    assert len(found.child) == 11
    assert found.parent[-1] == 1  # fires with the child only half of the time
    acts[10:] = 0
    acts[0, :] = 1
    found = describe_pairs(reading_of(acts), candidates, choose=True)
    assert len(found.child) == 8


@pytest.mark.parametrize(
    ("child", "parent", "expected"),
    [(1, 0, True), (1, 0.1, False), (0.39, 0, False), (0.41, 0, True)],
)
def test_is_absorbed(child, parent, expected):
    pair = np.float32([child]), np.float32([parent])
    assert is_absorbed(*pair, carried=2, typical=2).tolist() == [expected]
    assert is_absorbed(*pair, carried=-2, typical=2).tolist() == [False]


def test_a_grandparent_is_not_direct():
    acts = np.ones((4, 3))
    found = describe_pairs(reading_of(acts), parents([NO, NO], [0, NO], [0, 1]), choose=False)
    direct = dict(zip(zip(found.child, found.parent, strict=True), found.direct, strict=True))
    assert direct == {(1, 0): 1, (2, 0): 0, (2, 1): 1}


def test_a_circle_stays_visible():
    acts = np.ones((4, 3))
    found = describe_pairs(reading_of(acts), parents([1, NO], [0, NO], [0, 1]), choose=False)
    assert found.direct.tolist() == [1, 1, 1, 1]


def test_contexts_of_a_pair(absorbing):
    pairs = describe_pairs(absorbing, parents([NO], [PARENT], [NO]), choose=True)
    found = find_pair_examples(absorbing, pairs, 10, Amount(top=0, part=0, pair=3))
    places = dict[int, list[int]]()
    for kind, place in zip(found.kinds.tolist(), found.child.places.tolist(), strict=True):
        places.setdefault(kind, []).append(place)
    assert places.keys() == {ABSORBED, TOGETHER}
    assert len(places[ABSORBED]) == 3
    assert set(places[ABSORBED]) <= {*range(32, 40)}
    assert set(places[TOGETHER]) == {30, 31}
    assert found.parent.places.tolist() == found.child.places.tolist()


def test_a_context_without_the_parents_direction_is_only_missed(absorbing):
    apart = absorbing._replace(decoder=torch.eye(3))
    pairs = describe_pairs(apart, parents([NO], [PARENT], [NO]), choose=True)
    assert pairs.absorbed.tolist() == [0]
    found = find_pair_examples(apart, pairs, 10, Amount(top=0, part=0, pair=3))
    assert {*found.kinds.tolist()} == {MISSED, TOGETHER}


def test_without_pairs_there_is_nothing(absorbing):
    pairs = describe_pairs(absorbing, parents([NO], [NO], [NO]), choose=True)
    found = find_pair_examples(absorbing, pairs, 10, Amount(1, 1, 1))
    assert (found.starts.tolist(), found.kinds.tolist()) == ([0], [])
