import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from sae_lens_atm.explore.latents import BINS, NONE, describe_latents, nearest_rows
from sae_lens_atm.method.importance import combine_signals
from tests.explore.sample import reading_of

ACTS = [[1, 0, 0], [2, 0, 4], [0, 0, 4], [1, 0, 0]]


def occurrences(tokens, number):
    ones = np.ones(len(tokens), dtype=np.float32)
    return csr_matrix((ones, (tokens, range(len(tokens)))), (number, len(tokens)))


def test_figures():
    reading = reading_of(ACTS)
    found = describe_latents(reading, occurrences([0, 1, 1, 2], 3), (1, 1, 1))
    assert found.frequency.tolist() == [0.75, 0, 0.5]
    assert found.mean.tolist() == pytest.approx([4 / 3, 0, 4])
    assert found.maximum.tolist() == [2, 0, 4]
    np.testing.assert_allclose(found.importance, combine_signals(reading.signals).numpy())


def test_the_histogram_counts_every_activation():
    found = describe_latents(reading_of(ACTS), occurrences([0, 1, 1, 2], 3), (1, 1, 1)).histogram
    assert found.sum(1).tolist() == [3, 0, 2]
    assert found[0, BINS // 2] == 2  # activations of half the maximum
    assert found[0, -1] == 1
    assert found[2, -1] == 2


def test_top_tokens_are_neither_the_frequent_nor_the_rare_ones():
    # Token 0 is on 100 rows with 1, token 1 on 4 rows with 6, token 2 on 1 row with 7.
    tokens = [0] * 100 + [1] * 4 + [2]
    acts = [[1.0]] * 100 + [[6.0]] * 4 + [[7.0]]
    found = describe_latents(reading_of(acts), occurrences(tokens, 3), (1, 1, 1)).tokens
    assert found.tolist() == [[1, 0, 2, NONE, NONE]]  # 24 / 2, 100 / 10, 7 / 1


def test_nearest_rows_by_brute_force():
    decoder = torch.randn(30, 4)
    near, cosine = nearest_rows(decoder)
    unit = decoder / decoder.norm(dim=1, keepdim=True)
    for row in range(30):
        every = unit @ unit[row]
        others = sorted((k for k in range(30) if k != row), key=lambda k: -float(every[k]))
        assert near[row].tolist() == others[:8]
        np.testing.assert_allclose(cosine[row], every[others[:8]], atol=1e-6)


def test_few_rows_have_few_neighbours():
    assert nearest_rows(torch.eye(3))[0].shape == (3, 2)


def test_top_tokens_of_a_transposed_matrix():
    # Feature 3 is on in all three samples, feature 4 in the first.
    features = np.zeros((3, 5), dtype=np.float32)
    features[:, 3] = features[0, 4] = 1
    reading = reading_of([[2.0], [1.0], [1.0]])
    found = describe_latents(reading, csr_matrix(features).T, (1, 1, 1)).tokens
    assert found.tolist() == [[3, 4, NONE, NONE, NONE]]  # 4 / sqrt(3), 2 / 1
