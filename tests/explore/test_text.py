import numpy as np
import pytest
import torch

from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.explore.text import text_of, tokens_of
from sae_lens_atm.training.cached_run import cache_activations
from sae_lens_atm.training.run_file import load_run
from tests.conftest import CONTEXT


def collected(tokens):
    places, acts = zip(*tokens.batches, strict=True)
    return np.concatenate(places), torch.cat(acts)


@pytest.fixture
def fresh(language_model_yaml):
    return load_run(language_model_yaml, ["exclude_special_tokens=true"])


@pytest.fixture
def cached(language_model_yaml):
    settings = ["exclude_special_tokens=true", "activations.cache=cached"]
    run = load_run(language_model_yaml, [*settings, "activations.dtype=float32"])
    cache_activations(run, lambda *_: None)
    return run


def test_a_fresh_pass_and_a_cache_give_the_same(fresh, cached):
    model = load_language_model(fresh.runner)
    one, other = tokens_of(fresh, model, 10**6), tokens_of(cached, model, 10**6)
    places, acts = collected(one)
    cached_places, cached_acts = collected(other)
    number = len(cached_places)
    assert np.array_equal(one.ids[: len(other.ids)], other.ids)
    assert np.array_equal(places[:number], cached_places)
    torch.testing.assert_close(acts[:number], cached_acts, rtol=1e-4, atol=1e-4)
    assert one.rows == len(places)
    assert 0 not in one.ids.ravel()[places]  # <bos> is a special token


def test_contexts_are_spread_over_a_cache(cached):
    model = load_language_model(cached.runner)
    every, few = (tokens_of(cached, model, n) for n in (10**6, 3 * CONTEXT))
    assert len(few.ids) == 3
    middle = (len(every.ids) - 1) // 2
    assert np.array_equal(few.ids, every.ids[[0, middle, -1]])
    places, _ = collected(few)
    assert places.max() < 3 * CONTEXT


@pytest.mark.usefixtures("cached")
def test_a_cache_of_another_layer_is_refused(language_model_yaml):
    other = ["activations.cache=cached", "hook_name=model.layers.0"]
    run = load_run(language_model_yaml, [*other, "activations.dtype=float32"])
    with pytest.raises(SettingsError, match="was made with another hook_name"):
        tokens_of(run, None, 100)


def test_the_text_of_tokens(fresh):
    model = load_language_model(fresh.runner)
    assert text_of(model.tokenizer, np.array([0, 9])) == ["<bos>", "w5"]
    assert text_of(None, np.array([3])) == ["3"]
