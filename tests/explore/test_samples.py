import numpy as np
import pytest
import torch

from sae_lens_atm.data.synthetic import HierarchyModelConfig, build_hierarchy_model
from sae_lens_atm.explore.reading import read_tokens
from sae_lens_atm.explore.samples import (
    feature_names,
    joined,
    nearest_features,
    sample_contexts,
    samples_of,
)
from tests.explore.sample import linear_sae


@pytest.fixture
def model():
    cfg = HierarchyModelConfig(hidden_dim=8, roots=2, branching=2, depth=1, lone_features=1, bias=0)
    return build_hierarchy_model(cfg)


def test_names_say_where_a_feature_is(model):
    assert feature_names(model) == ["0", "0.0", "0.1", "1", "1.0", "1.1", "lone 6"]


def test_samples_are_the_same_in_every_call_and_have_their_features(model):
    def read():
        samples = samples_of(model, 3000)
        parts = [x for _, x in samples.tokens.batches]
        return torch.cat(parts), joined(samples.features)

    torch.manual_seed(1)
    (x, features), (again, _) = read(), read()
    assert torch.equal(x, again)
    assert features.shape == (3000, 7)
    vectors = model.feature_dict.feature_vectors.detach()
    torch.testing.assert_close(x, torch.from_numpy(features.toarray()) @ vectors)


def test_a_true_direction_is_its_own_nearest_feature(model):
    vectors = model.feature_dict.feature_vectors.detach()
    found = nearest_features(model, 3 * vectors)
    assert found.tokens[:, 0].tolist() == [*range(7)]
    np.testing.assert_allclose(found.logits[:, 0], 1, atol=1e-5)
    assert nearest_features(model, -vectors).lowest_tokens[:, 0].tolist() == [*range(7)]


def test_contexts_are_the_features_of_the_samples_that_are_shown(model):
    samples = samples_of(model, 500)
    (reading,) = read_tokens([linear_sae(torch.eye(8))], samples.tokens, lambda _: None, None)
    assert reading.rows == 500
    features = joined(samples.features)
    found = sample_contexts(features, np.array([400, 7, 7]))
    assert found["rows"].tolist() == [7, 400]
    for place, row in enumerate((7, 400)):
        part = slice(found["starts"][place], found["starts"][place + 1])
        dense = features[[row]].toarray()[0]
        tokens = found["tokens"][part].tolist()
        assert set(tokens) == set(np.flatnonzero(dense).tolist())
        assert sorted(tokens, key=lambda t: -dense[t]) == tokens
