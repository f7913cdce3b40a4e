import math

import pytest
import torch

from sae_lens_atm.metrics import HierarchyScore, hierarchy
from sae_lens_atm.metrics.probes import Probe


def sparse_acts(samples=900, latents=14):
    """Latents of falling frequency; latents 1 and 2 fire only with latent 0, the last one never."""
    random = torch.Generator().manual_seed(0)
    chance = torch.linspace(0.6, 0.05, latents)
    fires = torch.rand(samples, latents, generator=random) < chance
    fires[:, 1:3] &= fires[:, :1]
    fires[:, -1] = False
    return fires * torch.randn(samples, latents, generator=random)


def brute_children(acts, parent):
    """Return the children of a parent, by counting one pair after the other."""
    fires = (acts != 0).tolist()
    found = []
    for child in range(acts.shape[1]):
        of_child = [row for row in fires if row[child]]
        together = sum(row[parent] for row in of_child)
        if child != parent and len(of_child) >= 100 and together:
            found.append((-together / len(of_child), child))
    return [child for _, child in sorted(found)][:5]


def test_children_are_those_with_the_largest_coverage():
    acts = sparse_acts()
    metric = HierarchyScore(torch.randn(14, 6), parents=30)
    for part in acts.split(400):
        metric.update(torch.zeros(len(part), 6), part)
    pairs = metric.pairs()
    often = (acts != 0).sum(0).argsort(descending=True)[:7].tolist()
    parents = {parent for parent, _ in pairs}
    assert len(parents) > 3
    assert parents <= set(often)
    for parent in parents:
        expected = brute_children(acts, parent)
        found = [child for p, child in pairs if p == parent]
        assert found == expected * (len(found) // len(expected))
    assert {c for p, c in pairs if p == 0} >= {1, 2}


def test_a_pair_counts_if_both_rows_are_nearest_to_the_probe(monkeypatch):
    acts = torch.zeros(300, 12)
    acts[:200, 0] = 1  # with latent 1 on half of its samples
    acts[:100, 1] = 1
    decoder = torch.eye(12)

    def score(probe):
        trained = Probe(torch.tensor(probe), torch.zeros(2))
        monkeypatch.setattr(hierarchy, "train_probes", lambda *_args, **_settings: trained)
        metric = HierarchyScore(decoder * torch.arange(1, 13).float()[:, None], parents=60)
        metric.update(torch.zeros(300, 12), acts)
        drawn = [parent for parent, _ in metric.pairs()]
        return metric.compute(), drawn.count(0) / len(drawn)

    # Row 0 is the probe of latent 0 as a child of latent 1, row 1 that of latent 1.
    fifth = [0.5, 0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0]
    sixth = [0.4, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0]
    assert score([fifth, fifth])[0] == 1
    assert score([sixth, sixth])[0] == 0
    share, of_zero = score([sixth, fifth])  # only the pairs with parent 0
    assert 0 < share < 1
    assert share == of_zero


def family(samples=3000, width=24):
    """Inputs and activations of a latent and another one that fires only with it."""
    random = torch.Generator().manual_seed(1)
    parent = (torch.rand(samples, generator=random) < 0.4).float()
    child = parent * (torch.rand(samples, generator=random) < 0.4)
    acts = torch.zeros(samples, width)
    acts[:, 0], acts[:, 1] = parent, child
    return acts @ torch.eye(width), acts


def test_probes_find_a_family_and_no_family():
    x, acts = family()

    def score(decoder):
        metric = HierarchyScore(decoder)
        metric.update(x, acts)
        return metric.compute()

    decoder = torch.eye(24)
    assert score(decoder) == 1
    decoder[0] *= -1  # the inputs on which latent 0 fires do not contain its row
    assert score(decoder) == 0


def test_true_features_score_the_share_of_true_pairs():
    random = torch.Generator().manual_seed(2)
    features = torch.linalg.qr(torch.randn(32, 32, generator=random)).Q

    def fire(chance):
        return torch.rand(12_000, generator=random) < chance

    parents = [fire(0.2) for _ in range(4)]
    children = [parents[i] & fire(0.25) for i in (0, 0, 1, 1, 2, 2, 3, 3)]
    acts = torch.stack([*parents, *children, *(fire(0.03) for _ in range(20))], 1).float()
    metric = HierarchyScore(features)
    metric.update(acts @ features, acts)
    family_of = [0, 1, 2, 3, 0, 0, 1, 1, 2, 2, 3, 3, *range(4, 24)]
    true = [family_of[p] == family_of[c] and min(p, c) < 4 for p, c in metric.pairs()]
    share = sum(true) / len(true)
    assert 0.05 < share < 0.5
    assert metric.compute() == pytest.approx(share, abs=0.06)


def test_the_first_samples_are_used_and_the_global_random_state_is_not():
    x, acts = family()
    before = torch.get_rng_state()
    one, other = HierarchyScore(torch.eye(24), samples=1000), HierarchyScore(torch.eye(24))
    for part in (slice(0, 600), slice(600, 1800), slice(1800, 3000)):
        one.update(x[part][None], acts[part][None])
    other.update(x[:1000], acts[:1000])
    assert one.is_full
    assert not other.is_full
    assert one.pairs() == other.pairs()
    assert one.compute() == other.compute()
    assert torch.equal(torch.get_rng_state(), before)


def test_without_pairs_there_is_no_score():
    metric = HierarchyScore(torch.eye(4))
    assert math.isnan(metric.compute())
    metric.update(torch.zeros(300, 4), torch.zeros(300, 4))  # nothing fires
    assert math.isnan(metric.compute())
    metric.update(torch.zeros(200, 4), torch.eye(4).repeat(50, 1))  # each on 50 samples, alone
    assert math.isnan(metric.compute())
    metric.reset()
    assert metric.seen == 0


def test_wrong_shapes_and_numbers_are_errors():
    metric = HierarchyScore(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"must be \(\.\.\., 2\) and \(\.\.\., 3\)"):
        metric.update(torch.ones(5, 2), torch.ones(5, 2))
    for name in ("samples", "parents"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            HierarchyScore(torch.ones(3, 2), **{name: 0})
