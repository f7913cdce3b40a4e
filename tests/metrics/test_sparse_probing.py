import importlib
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import stats

from sae_lens_atm.metrics.sparse_probing import (
    interval_over_tasks,
    latents_by_difference,
    probe_scores,
    split_rows,
)

RNG = np.random.default_rng(0)


def balanced(rows):
    return RNG.permutation(np.arange(rows) % 2)


@pytest.mark.parametrize(
    ("rows", "most", "train", "test"),
    [(3000, None, 1024, 1975), (800, None, 700, 99), (3000, 1200, 1024, 175), (800, 301, 201, 99)],
)
def test_rows_are_split_with_as_many_of_each_class(rows, most, train, test):
    labels = balanced(rows)
    split = split_rows(labels, most, 3)
    assert (len(split.train), len(split.test)) == (train, test)
    assert not set(split.train) & set(split.test)
    for part in split:
        assert abs(2 * labels[part].sum() - len(part)) <= 1
    again, other = split_rows(labels, most, 3), split_rows(labels, most, 4)
    assert (again.train == split.train).all()
    assert (other.train != split.train).any()


def test_latents_are_ordered_by_the_difference_of_their_scaled_means():
    acts = torch.tensor(
        [
            [4.0, 0.0, 1.0, 0.0, 0.0],
            [4.0, 0.0, 0.0, 0.0, 2.0],
            [4.0, 30.0, 1.0, 0.0, 0.0],
            [4.0, 10.0, 1.0, 0.0, 0.0],
        ]
    )
    # Scaled by the means where they fire, 4, 20, 1, -, 2: differences 0, 1, 1/2, 0, -1/2.
    order = latents_by_difference(acts, torch.tensor([0, 0, 1, 1])).tolist()
    assert order[0] == 1
    assert set(order[1:3]) == {2, 4}
    assert latents_by_difference(-acts, torch.tensor([1, 1, 0, 0]))[0] == 1


def made(rows=900, gap=1.0, width=1):
    labels = balanced(rows)
    x = RNG.standard_normal((rows, width)) + gap * labels[:, None]
    return torch.tensor(x, dtype=torch.float32), labels


@pytest.mark.parametrize("penalty", ["l1", "l2"])
def test_the_auc_of_one_dimension_is_that_of_its_ranks(penalty):
    pytest.importorskip("sklearn")
    x, labels = made()
    train, test = slice(0, 600), slice(600, None)
    scores = probe_scores(x[train], labels[train], x[test], labels[test], penalty, 0)
    one, zero = (x[test][labels[test] == label, 0].numpy() for label in (1, 0))
    auc = stats.mannwhitneyu(one, zero).statistic / (len(one) * len(zero))
    assert scores.auc == pytest.approx(auc, abs=1e-9)
    # The best threshold of two normal distributions one apart is right with Phi(1/2) = .69.
    assert scores.accuracy == pytest.approx(0.69, abs=0.06)
    assert scores.f1 == pytest.approx(scores.accuracy, abs=0.01)


def test_separate_classes_are_told_apart_and_noise_is_not():
    pytest.importorskip("sklearn")
    x, labels = made(gap=20)
    perfect = probe_scores(x[:600], labels[:600], x[600:], labels[600:], "l1", 0)
    assert perfect == (1, 1, 1)
    x, labels = made(gap=0, width=5)
    noise = probe_scores(x[:600], labels[:600], x[600:], labels[600:], "l1", 0)
    assert noise.auc == pytest.approx(0.5, abs=0.12)


def test_the_interval_is_that_of_a_mean():
    values = RNG.standard_normal(400).tolist()
    low, high = interval_over_tasks(values, 0)
    half = 1.96 * np.std(values) / 20
    assert low == pytest.approx(np.mean(values) - half, abs=0.01)
    assert high == pytest.approx(np.mean(values) + half, abs=0.01)
    assert interval_over_tasks(values, 0) == (low, high)
    assert interval_over_tasks([0.7], 0) == (0.7, 0.7)


def test_the_same_tasks_are_resampled_for_every_sae():
    values = RNG.standard_normal(30)
    low, high = interval_over_tasks(values.tolist(), 5)
    shifted = interval_over_tasks((values + 1).tolist(), 5)
    assert shifted == pytest.approx((low + 1, high + 1))


@pytest.fixture(scope="module")
def original():
    """The modules of sae-probes. It imports xgboost, which none of the functions below use."""
    pytest.importorskip("sklearn")
    xgboost = sys.modules.get("xgboost")
    sys.modules["xgboost"] = xgboost or ModuleType("xgboost")
    try:
        pytest.importorskip("sae_probes", reason="the package sae-probes is missing")
        names = ("run_sae_evals", "utils_data", "utils_training")
        return [importlib.import_module(f"sae_probes.{name}") for name in names]
    finally:
        if xgboost is None:
            del sys.modules["xgboost"]


def test_split_latents_and_scores_are_those_of_sae_probes(original):
    run_sae_evals, utils_data, utils_training = original
    labels = balanced(900)
    acts = torch.rand(900, 40) * (torch.rand(900, 40) < 0.3)
    acts += torch.tensor(labels)[:, None] * torch.rand(40) * (torch.rand(900, 40) < 0.1)
    split = split_rows(labels, None, 42)
    train, test = utils_data.get_train_test_indices(labels, 800, 99, 0.5, 42)
    assert (split.train == train).all()
    assert (split.test == test).all()
    x, y = acts[train], torch.tensor(labels[train])
    order = run_sae_evals.get_sorted_indices(x, y, run_sae_evals.mean_act_normalization)
    assert (latents_by_difference(x, y) == order).all()
    for penalty, best in (("l1", order[:1]), ("l1", order[:5]), ("l2", order)):
        parts = (x[:, best], labels[train], acts[test][:, best], labels[test])
        theirs = utils_training.find_best_reg(*parts, penalty=penalty, seed=42).metrics
        ours = probe_scores(*parts, penalty, 42)
        assert ours == (theirs.test_auc, theirs.test_acc, theirs.test_f1)
