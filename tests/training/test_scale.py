import math
from itertools import count, islice

import pytest
import torch
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_atm.training.scale import ACCURACY, mean_norm


class Batches:
    """Endless batches of vectors, whose norms have this mean and standard deviation."""

    def __init__(self, spread, size=64, mean=5.0):
        self.taken = []
        generator = torch.Generator().manual_seed(0)
        self._batches = (
            torch.stack(
                [mean + spread * torch.randn(size, generator=generator), torch.zeros(size)], 1
            )
            for _ in count()
        )

    def __iter__(self):
        return self

    def __next__(self):
        self.taken.append(next(self._batches))
        return self.taken[-1]


@pytest.mark.parametrize("spread", [0.2, 0.5])
def test_the_number_of_batches_is_that_of_the_standard_error(spread):
    batches = Batches(spread)
    found = mean_norm(batches, 1000)
    # (spread / mean / accuracy)^2 vectors in all: 25 and 156 batches
    expected = (spread / 5 / ACCURACY) ** 2 / 64
    assert len(batches.taken) == pytest.approx(expected, rel=0.4)
    means = torch.stack([batch.norm(dim=1).mean() for batch in batches.taken])
    error = means.std() / math.sqrt(len(means))
    assert error <= ACCURACY * found
    assert means[:-1].std() / math.sqrt(len(means) - 1) > ACCURACY * found  # one less is too few
    assert found == pytest.approx(5, rel=4 * ACCURACY)


def test_it_is_saelens_estimate_from_the_batches_taken():
    batches, scaler = Batches(2.0), ActivationScaler()
    found = mean_norm(batches, 12)
    assert len(batches.taken) == 12
    scaler.estimate_scaling_factor(2, iter(batches.taken), 12)
    assert 2**0.5 / found == scaler.scaling_factor


def test_few_batches_are_never_enough():
    assert mean_norm(batches := Batches(0.0), 1000) == 5
    assert len(batches.taken) == 10
    assert len(list(islice(batches, 2))) == 2


def test_norms_in_half_precision_do_not_overflow():
    batch = torch.full((4096, 4), 200.0, dtype=torch.float16)
    assert mean_norm(iter([batch] * 3), 3) == 400
