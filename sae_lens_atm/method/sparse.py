"""Products with the few activations that are not 0, and their gradients.

Of the products of a training step (encode, decode, the gradients of the activations, of the
decoder, of the encoder, and those of the statistics) only the first needs every latent. The others
need the active ones alone, ``k`` of ``d_sae``: there each is a sparse product.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from typing_extensions import override

with warnings.catch_warnings():  # PyTorch says once that CSR is in beta; nobody here can act on it
    warnings.simplefilter("ignore")
    torch.zeros(1, 1).to_sparse_csr()


def sparse_products_are_fast(like: Tensor) -> bool:
    """Whether sparse products beat dense ones here: with MKL, in the precisions that it has.

    On a GPU they were not measured, so dense ones are used there.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(like.device.type):
        return False
    exact = like.dtype in (torch.float32, torch.float64)
    return like.device.type == "cpu" and exact and torch.backends.mkl.is_available()


@dataclass(frozen=True)
class Pattern:
    """Where the entries of a sparse matrix are, ascending by row."""

    rows: Tensor
    columns: Tensor
    shape: tuple[int, int]

    @cached_property
    def starts(self) -> Tensor:
        """Where each row begins."""
        edges = torch.arange(self.shape[0] + 1, device=self.rows.device)
        return torch.searchsorted(self.rows, edges)

    @cached_property
    def _transposed(self) -> tuple[Tensor, "Pattern"]:
        order = self.columns.sort(stable=True).indices
        height, width = self.shape
        return order, Pattern(self.columns[order], self.rows[order], (width, height))

    def matrix(self, values: Tensor) -> Tensor:
        """The matrix that has these values there, in CSR."""
        return torch.sparse_csr_tensor(
            self.starts, self.columns, values, self.shape, check_invariants=False
        )

    def transposed_matrix(self, values: Tensor) -> Tensor:
        """Its transpose, in CSR."""
        order, pattern = self._transposed
        return pattern.matrix(values[order])

    def coo(self, values: Tensor) -> Tensor:
        """The matrix in COO, which SAELens' trainer knows."""
        places = torch.stack([self.rows, self.columns])
        return torch.sparse_coo_tensor(
            places, values, self.shape, is_coalesced=True, check_invariants=False
        )

    def sum_of_columns(self, values: Tensor) -> Tensor:
        """The sum of each column, shape ``(columns,)``."""
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


def dots_at(
    left: Tensor,
    right: Tensor,
    pattern: Pattern,
    bias: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """``<left_r, right_c> + bias_c`` at each entry ``(r, c)`` of the pattern.

    `known` is the result, where a product of all has been made already.
    """
    return _DotsAt.apply(left, right, bias, pattern, known)  # pyright: ignore[reportReturnType]


def squared_error(
    x: Tensor, values: Tensor, rows: Tensor, bias: Tensor, pattern: Pattern
) -> tuple[Tensor, Tensor, Tensor]:
    """``E |x - S rows - bias|^2`` over the rows of ``x``, ``S`` the sparse matrix of the values.

    Returns:
        It; ``S rows + bias``; and ``<e_r, rows_c>`` at each entry ``(r, c)`` of the pattern, with
        ``e`` the residual. That is the gradient of the values but for a factor, and what the
        statistics need: one product serves both. The last two have no gradient.
    """
    return _SquaredError.apply(x, values, rows, bias, pattern)  # pyright: ignore[reportReturnType]


def _sampled(pattern: Pattern, left: Tensor, right: Tensor) -> Tensor:
    zeros = left.new_zeros(pattern.columns.numel())
    matrix = pattern.matrix(zeros)
    return torch.sparse.sampled_addmm(matrix, left.contiguous(), right.T, beta=0.0).values()
