import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens.saes.batchtopk_sae import BatchTopK

from sae_lens_atm.method import selection
from sae_lens_atm.method.selection import largest_of_each, largest_positive


def test_by_hand():
    places, values = largest_positive(torch.tensor([[1.0, -2.0, 5.0], [0.0, 3.0, 2.0]]), 3)
    assert places.tolist() == [2, 4, 5]
    assert values.tolist() == [5, 3, 2]


def test_nothing_that_is_not_positive_is_kept():
    places, values = largest_positive(torch.tensor([[1.0, -2.0, 0.0]]), 3)
    assert (places.tolist(), values.tolist()) == ([0], [1.0])
    assert largest_positive(torch.zeros(2, 2), 3)[0].numel() == 0


def test_of_equal_values_the_first_are_kept():
    places, _ = largest_positive(torch.tensor([[2.0, 1.0, 1.0], [1.0, 3.0, 1.0]]), 4)
    assert places.tolist() == [0, 1, 2, 4]


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    width=st.integers(1, 300),
    k=st.floats(0.1, 20),
    kind=st.sampled_from(["normal", "heavy", "few columns", "mostly negative"]),
)
def test_what_is_kept_is_bit_for_bit_what_saelens_keeps(seed, rows, width, k, kind):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator)
    if kind == "heavy":
        values = values**5
    elif kind == "few columns":  # as where a few latents fire much more strongly than others
        values[:, ::61] += 50
    elif kind == "mostly negative":
        values -= 2
    k = min(k, width)
    places, kept = largest_positive(values, int(k * rows))
    expected = BatchTopK(k)(values)
    found = torch.zeros(rows * width).scatter(0, places, kept).view(rows, width)
    assert torch.equal(found, expected)
    assert (places[1:] > places[:-1]).all()


@pytest.mark.parametrize("bound", [-1.0, 0.0, 1e9])
def test_a_bad_guess_changes_nothing(monkeypatch, bound):
    values = torch.randn(50, 100)
    expected = largest_positive(values, 300)
    monkeypatch.setattr(selection, "_lower_bound", lambda *_: torch.tensor(max(bound, 0.0)))
    for found, wanted in zip(largest_positive(values, 300), expected, strict=True):
        assert torch.equal(found, wanted)


def test_little_is_sorted(monkeypatch):
    """What is sorted is the sample and not much more than what is kept."""
    sizes = []
    topk = torch.Tensor.topk

    def counted(self, *args, **kwargs):
        sizes.append(self.numel())
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", counted)
    largest_positive(torch.randn(1024, 2048), 32 * 1024)
    assert sum(sizes) < 0.05 * 1024 * 2048


def test_the_largest_activations_of_each_sample():
    acts = torch.tensor([[3.0, 0.0, 1.0, 2.0], [0.0, 4.0, 0.0, 0.0]])
    one, two = largest_of_each(acts, [1, 2])
    assert one.tolist() == [[3, 0, 0, 0], [0, 4, 0, 0]]
    assert two.tolist() == [[3, 0, 0, 2], [0, 4, 0, 0]]
    assert largest_of_each(acts, []) == []
