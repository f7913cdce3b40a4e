"""SAEs of a comparison that share the activations of a language model."""

from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

from sae_lens_atm.compare import load_comparison
from sae_lens_atm.compare.run import group
from sae_lens_atm.compare.run.group import SharedBatches
from sae_lens_atm.compare.run.language_model import train_group
from sae_lens_atm.errors import NonFiniteBatchError
from sae_lens_atm.training.hooks import StopFlag
from tests.helpers import state_equal


@pytest.fixture
def spoil(monkeypatch):
    """Put bad batches before some of the batches of a group."""

    def spoil(before, how, times=1):
        def spoilt(batches):
            for i, batch in enumerate(batches):
                for _ in range(times if i in before else 0):
                    yield {hook: how(acts) for hook, acts in batch.items()}
                yield batch

        monkeypatch.setattr(group, "SharedBatches", lambda batches: SharedBatches(spoilt(batches)))

    return spoil


def train_one_group(path, *overrides):
    comparison = load_comparison(path, ["seeds=[0]", *overrides])
    train_group(comparison.planned, comparison.output, 4, lambda *_: None, StopFlag())
    weights = comparison.output.glob("runs/*/sae/sae_weights.safetensors")
    return {p.parent.parent.name: load_file(p) for p in weights}


@pytest.mark.parametrize(
    ("how", "overrides"),
    [
        (lambda x: x / 0, []),
        (lambda x: x * 1e30, []),  # finite, but the loss overflows
        (
            lambda x: x / 0,
            ["sae.normalize_activations=expected_average_only_in", "n_batches_for_norm_estimate=3"],
        ),
    ],
    ids=["inf", "overflow", "while the scale is estimated"],
)
def test_all_saes_of_a_group_skip_bad_batches(
    language_model_comparison_yaml, spoil, how, overrides
):
    plain = train_one_group(language_model_comparison_yaml, *overrides, "output_path=plain")
    spoil([0, 7], how, times=2)
    spoilt = train_one_group(language_model_comparison_yaml, *overrides, "output_path=spoilt")
    assert len(plain) == 4
    assert plain.keys() == spoilt.keys()
    for name, state in plain.items():
        assert state_equal(state, spoilt[name]), name


def test_too_many_bad_batches_stop_a_group(language_model_comparison_yaml, spoil):
    spoil([3], lambda x: x / 0, times=4)
    with pytest.raises(NonFiniteBatchError, match=r"^4 bad batches in a row at step 3"):
        train_one_group(language_model_comparison_yaml, "max_bad_batches=4")


def test_saes_that_reject_a_batch_get_the_same_replacement():
    batches = SharedBatches({"x": torch.tensor(i)} for i in range(100))
    one, other = batches.of("x"), batches.of("x")
    assert next(batches)["x"] == 0
    assert list(islice(one, 2)) == [1, 2]
    assert next(other) == 1
    assert next(batches)["x"] == 3  # the next step
    assert [next(other), next(one), next(other)] == [4, 4, 5]
