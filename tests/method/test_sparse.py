import pytest
import torch
from torch.testing import assert_close

from sae_lens_atm.method.sparse import Pattern, dots_at, sparse_products_are_fast, squared_error


def a_pattern(density=0.3, shape=(7, 5)):
    mask = torch.rand(shape) < density
    return Pattern(*mask.nonzero(as_tuple=True), shape), mask


def test_the_matrix_and_its_transpose():
    pattern, mask = a_pattern()
    values = torch.randn(int(mask.sum()))
    dense = torch.zeros(7, 5).masked_scatter(mask, values)
    assert torch.equal(pattern.matrix(values).to_dense(), dense)
    assert torch.equal(pattern.transposed_matrix(values).to_dense(), dense.T)
    assert torch.equal(pattern.coo(values).to_dense(), dense)
    assert pattern.coo(values).is_coalesced()
    assert_close(pattern.sum_of_columns(values), dense.sum(0))


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_dots_at_and_their_gradients(density):
    pattern, mask = a_pattern(density)
    leaves = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (7, 5)]
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    left, right = leaves
    expected = (left @ right.T + bias)[mask]
    found = dots_at(left, right, pattern, bias)
    assert_close(found, expected)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), [*leaves, bias])
    got = torch.autograd.grad((found * weights).sum(), [*leaves, bias])
    assert_close(got, wanted)
    # a result already known has the same gradients
    known = dots_at(left, right, pattern, bias, known=expected.detach())
    assert torch.equal(known, expected)
    assert_close(torch.autograd.grad((known * weights).sum(), [*leaves, bias]), wanted)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_the_squared_error_and_its_gradients(density):
    pattern, mask = a_pattern(density)
    x = torch.randn(7, 4, dtype=torch.float64)
    leaves = [
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((int(mask.sum()),), (5, 4), (4,))
    ]
    values, rows, bias = leaves
    result = torch.zeros(7, 5, dtype=torch.float64).masked_scatter(mask, values) @ rows + bias
    expected = (x - result).square().sum(1).mean()
    found, shown, aligned = squared_error(x, values, rows, bias, pattern)
    assert_close(found, expected)
    assert_close(shown, result.detach())
    assert_close(aligned, ((x - result) @ rows.T)[mask].detach())
    assert not shown.requires_grad
    assert_close(torch.autograd.grad(3 * found, leaves), torch.autograd.grad(3 * expected, leaves))


def test_where_they_are_used():
    assert sparse_products_are_fast(torch.zeros(1)) == torch.backends.mkl.is_available()
    assert not sparse_products_are_fast(torch.zeros(1, dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not sparse_products_are_fast(torch.zeros(1))
