import math

import pytest
import torch

from sae_lens_atm.metrics import ContrastiveScore


def test_the_score_by_hand():
    metric = ContrastiveScore()
    # V1 = (2, 0, 1), V2 = (0, 0, 0): d = (2, 0, 1), its mean 1 and deviation 1.
    metric.update(torch.tensor([[4.0, 0, 0], [0, 0, 2]]), torch.zeros(5, 3))
    assert metric.compute() == pytest.approx(1)
    # d = (0, 3, 0), its mean 1 and deviation sqrt(3). The sign does not count.
    metric.update(torch.zeros(1, 3), torch.tensor([[0, 3.0, 0]]))
    assert metric.by_pair == pytest.approx([1, 2 / math.sqrt(3)])
    assert metric.compute() == pytest.approx((1 + 2 / math.sqrt(3)) / 2)


@pytest.mark.parametrize("latents", [2, 10, 1000])
def test_one_latent_that_differs_has_the_largest_score(latents):
    metric = ContrastiveScore()
    acts = torch.zeros(4, latents)
    acts[2, 1] = 0.7
    metric.update(acts, torch.zeros(3, latents))
    assert metric.compute() == pytest.approx((latents - 1) / math.sqrt(latents))


def test_the_score_is_that_of_the_code():
    """The lines of CE-Bench, token by token."""
    random = torch.Generator().manual_seed(0)
    metric, scores = ContrastiveScore(), []
    for tokens in ((3, 7), (6, 2), (4, 4)):
        stories = [torch.rand(n, 20, generator=random) ** 4 for n in tokens]
        averages = []
        for story in stories:
            total = torch.zeros(20)
            for token in story:
                total = total + token
            averages.append(total / len(story))
        distance = torch.abs(averages[0] - averages[1])
        scores.append(float(((distance - torch.mean(distance)) / torch.std(distance)).max()))
        metric.update(*stories)
    assert metric.by_pair == pytest.approx(scores, rel=1e-5)


def test_equal_stories_score_0_and_no_pairs_have_no_score():
    metric = ContrastiveScore()
    assert math.isnan(metric.compute())
    metric.update(torch.ones(2, 3), torch.ones(4, 3))
    assert metric.compute() == 0
    metric.reset()
    assert math.isnan(metric.compute())


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((2, 3), (2, 4), "the same latents"),
        ((3,), (3,), r"must be \(tokens, latents\)"),
        ((0, 3), (2, 3), "must have tokens, got 0 and 2"),
    ],
)
def test_wrong_shapes_are_errors(first, second, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveScore().update(torch.ones(first), torch.ones(second))
