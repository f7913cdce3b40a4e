import math

import pytest
import torch

from sae_lens_atm.metrics import DecoderCosine, NthDecoderProjection, decoder_cosine

ROOT = math.sqrt(0.5)
DECODER = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 1.0]])  # cosines 0, -.707, .707


def test_the_cosine_by_hand():
    assert decoder_cosine(DECODER) == pytest.approx(2 * ROOT / 3)
    assert decoder_cosine(DECODER, torch.tensor([True, True, False])) == 0
    assert decoder_cosine(DECODER, torch.tensor([True, False, True])) == pytest.approx(ROOT)


def test_the_cosine_of_parallel_and_of_too_few_rows():
    assert decoder_cosine(torch.tensor([[1.0, 2.0], [-2.0, -4.0]])) == pytest.approx(1)
    assert math.isnan(decoder_cosine(DECODER, torch.tensor([True, False, False])))


def test_the_cosine_is_that_of_all_pairs(monkeypatch):
    monkeypatch.setattr("sae_lens_atm.metrics.decoder._CHUNK", 7)
    rows = torch.randn(31, 9, generator=torch.Generator().manual_seed(0))
    pairs = [
        abs(float(torch.cosine_similarity(rows[i], rows[j], dim=0)))
        for i in range(31)
        for j in range(i)
    ]
    assert decoder_cosine(rows) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


def test_random_directions_have_the_expected_cosine():
    rows = torch.randn(400, 256, generator=torch.Generator().manual_seed(1))
    assert decoder_cosine(rows) == pytest.approx(math.sqrt(2 / (math.pi * 256)), rel=0.01)


def test_latents_that_never_fire_are_left_out():
    metric = DecoderCosine(DECODER)
    metric.update(torch.tensor([[1.0, 0.0, 0.0]]))
    metric.update(torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.0, -0.5]]]))
    assert metric.alive.tolist() == [True, False, True]
    assert metric.compute() == pytest.approx(ROOT)
    metric.reset()
    assert math.isnan(metric.compute())
    with pytest.raises(ValueError, match="the decoder has 3 rows"):
        metric.update(torch.ones(1, 2))


def test_the_projection_by_hand():
    metric = NthDecoderProjection(DECODER, torch.tensor([1.0, 1.0]))
    metric.update(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))  # without the bias: [1, 0] and [0, 2]
    # The projections are 1, 0, -.707 and 0, 2, 1.414: sorted 2, 1.414, 1, 0, 0, -.707.
    assert [metric.compute(n=n) for n in (0, 1, 2)] == [2, 1, 0]
    assert metric.compute() == 1
    living = torch.tensor([True, True, False])  # 1, 0 and 0, 2: sorted 2, 1, 0, 0
    assert metric.compute(living) == 0
    assert metric.compute(living, n=0) == 2


def test_the_projection_is_that_of_the_paper():
    random = torch.Generator().manual_seed(0)
    decoder = torch.nn.functional.normalize(torch.randn(40, 8, generator=random), dim=1)
    bias, x = torch.randn(8, generator=random), torch.randn(100, 8, generator=random)
    metric = NthDecoderProjection(decoder * 3, bias)
    for part in x.split(30):
        metric.update(part)
    expected = ((x - bias) @ decoder.T).flatten().sort(descending=True).values[20 * 100]
    assert metric.compute() == pytest.approx(float(expected), abs=1e-6)


def test_the_projection_uses_the_first_samples():
    metric = NthDecoderProjection(DECODER, torch.zeros(2), samples=3)
    metric.update(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]))
    metric.update(torch.tensor([[1.0, 0.0], [9.0, 9.0]]))
    metric.update(torch.tensor([[9.0, 9.0]]))
    assert metric.compute(n=0) == 1
    metric.reset()
    assert math.isnan(metric.compute())


@pytest.mark.parametrize("n", [-1, 3])
def test_n_is_at_most_the_number_of_rows(n):
    metric = NthDecoderProjection(DECODER, torch.zeros(2))
    metric.update(torch.ones(1, 2))
    with pytest.raises(ValueError, match="n must be from 0 to 2"):
        metric.compute(n=n)
    with pytest.raises(ValueError, match="samples must be at least 1"):
        NthDecoderProjection(DECODER, torch.zeros(2), samples=0)
