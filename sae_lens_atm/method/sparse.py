"""Matrix products with sparse activations, and their gradients.

A training step has a product for encoding, one for decoding, three for gradients and some for
statistics. Only encoding needs all latents. The others need the active latents, ``k`` of ``d_sae``
in a row. This module computes them as sparse products.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from typing_extensions import override

with warnings.catch_warnings():  # PyTorch warns once that CSR is in beta
    warnings.simplefilter("ignore")
    torch.zeros(1, 1).to_sparse_csr()


def sparse_products_are_fast(like: Tensor) -> bool:
    """Return whether sparse products are faster than dense ones for tensors like this one.

    They are on a CPU with MKL, in float32 and float64. They have not been measured on a GPU.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(like.device.type):
        return False
    exact = like.dtype in (torch.float32, torch.float64)
    return like.device.type == "cpu" and exact and torch.backends.mkl.is_available()


@dataclass(frozen=True)
class Pattern:
    """Rows and columns of the entries of a sparse matrix, ascending by row."""

    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    @cached_property
    def starts(self) -> Tensor:
        """Index of the first entry of each row, shape ``(rows + 1,)``."""
        edges = torch.arange(self.shape[0] + 1, device=self.rows.device)
        return torch.searchsorted(self.rows, edges)

    @cached_property
    def _transposed(self) -> tuple[Tensor, "Pattern"]:
        order = self.columns.sort(stable=True).indices
        height, width = self.shape
        return order, Pattern(self.columns[order], self.rows[order], (width, height))

    def matrix(self, values: Tensor) -> Tensor:
        """Return the CSR matrix with these values at the entries."""
        return torch.sparse_csr_tensor(
            self.starts, self.columns, values, self.shape, check_invariants=False
        )

    def transposed_matrix(self, values: Tensor) -> Tensor:
        """Return the transpose of `matrix`, in CSR."""
        order, pattern = self._transposed
        return pattern.matrix(values[order])

    def coo(self, values: Tensor) -> Tensor:
        """Return the matrix in COO, the sparse format that SAELens' trainer accepts."""
        places = torch.stack([self.rows, self.columns])
        return torch.sparse_coo_tensor(
            places, values, self.shape, is_coalesced=True, check_invariants=False
        )

    def sum_of_columns(self, values: Tensor) -> Tensor:
        """Return the sum of each column, shape ``(columns,)``."""
        return values.new_zeros(self.shape[1]).index_add(0, self.columns, values)


class _DotsAt(Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        pattern: Pattern,
        known: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.pattern = pattern
        if known is not None:
            return known
        dots = _sampled(pattern, left, right)
        return dots if bias is None else dots + bias[pattern.columns]

    @staticmethod
    @override
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        left, right = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        needed = ctx.needs_input_grad
        return (
            pattern.matrix(grad) @ right if needed[0] else None,
            pattern.transposed_matrix(grad) @ left if needed[1] else None,
            pattern.sum_of_columns(grad) if needed[2] else None,
            None,
            None,
        )


class _SquaredError(Function):
    @staticmethod
    @override
    def forward(
        ctx: Any, x: Tensor, values: Tensor, rows: Tensor, bias: Tensor, pattern: Pattern
    ) -> tuple[Tensor, Tensor, Tensor]:
        result = pattern.matrix(values) @ rows + bias
        residual = x - result
        aligned = _sampled(pattern, residual, rows)
        ctx.save_for_backward(values, residual, aligned)
        ctx.pattern = pattern
        ctx.mark_non_differentiable(result, aligned)
        return residual.square().sum() / len(x), result, aligned

    @staticmethod
    @override
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        values, residual, aligned = ctx.saved_tensors
        scale = -2 * grad_outputs[0] / len(residual)
        to_rows = ctx.pattern.transposed_matrix(scale * values) @ residual
        return None, scale * aligned, to_rows, scale * residual.sum(0), None


class _Product(Function):
    @staticmethod
    @override
    def forward(ctx: Any, values: Tensor, rows: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, rows)
        ctx.pattern = pattern
        return pattern.matrix(values) @ rows

    @staticmethod
    @override
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad,) = grad_outputs
        values, rows = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        return _sampled(pattern, grad, rows), pattern.transposed_matrix(values) @ grad, None


def product(values: Tensor, rows: Tensor, pattern: Pattern) -> Tensor:
    """Return ``S rows``; ``S`` holds the values at the entries of the pattern."""
    return _Product.apply(values, rows, pattern)  # pyright: ignore[reportReturnType]


def dots_at(
    left: Tensor,
    right: Tensor,
    pattern: Pattern,
    bias: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Return ``<left_r, right_c> + bias_c`` at each entry ``(r, c)`` of the pattern.

    If `known` is given, it is the result, and only the gradients are computed.
    """
    return _DotsAt.apply(left, right, bias, pattern, known)  # pyright: ignore[reportReturnType]


def squared_error(
    x: Tensor, values: Tensor, rows: Tensor, bias: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``E |x - S rows - bias|^2`` over the rows of ``x``; ``S`` holds the values.

    Returns:
        The mean squared error; the reconstruction ``S rows + bias``; and ``<e_r, rows_c>`` at each
        entry ``(r, c)`` of the pattern, with ``e`` the residual. The last is both the gradient of
        the values, up to a factor, and an input of the statistics. Only the first has a gradient.
    """
    return _SquaredError.apply(x, values, rows, bias, pattern)  # pyright: ignore[reportReturnType]


def _sampled(pattern: Pattern, left: Tensor, right: Tensor) -> Tensor:
    zeros = left.new_zeros(pattern.columns.numel())
    matrix = pattern.matrix(zeros)
    return torch.sparse.sampled_addmm(matrix, left.contiguous(), right.T, beta=0.0).values()
