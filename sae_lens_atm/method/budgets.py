"""Loss on smaller budgets: the error if only the largest activations of each sample are used.

This part is ours, not the paper's. HierarchicalTopK (arXiv 2505.24473) has the same loss, at more
budgets. With the parts ``a_i d_i`` of a sample, the largest first::

    x_b = b_dec + sum of the first b parts
    E_b = mean over samples of |x - x_b|^2

The loss of BatchTopK is the error of all k latents together. Here the b largest of them must also
explain the input.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_lens_atm.method.sparse import Pattern, product

_SHARES = (1 / 8, 1 / 4, 1 / 2)


def smaller_budgets(k: float) -> list[int]:
    """Return the budgets ``b``: k/8, k/4 and k/2, rounded, each once, those below 1 left out."""
    return sorted({round(share * k) for share in _SHARES} - {0})


def ranks(values: Tensor, pattern: Pattern) -> Tensor:
    """Return the rank of each value in its row, 0 for the largest.

    Args:
        values: one for each entry of the pattern.
        pattern: rows and columns of the entries.
    """
    falling = values.argsort(descending=True, stable=True)
    order = falling[pattern.rows[falling].argsort(stable=True)]  # by row, then falling
    places = torch.arange(len(values), device=values.device)
    ranks = torch.empty_like(places)
    ranks[order] = places - pattern.starts[pattern.rows]
    return ranks


def sparse_errors(
    target: Tensor,
    values: Tensor,
    rows: Tensor,
    bias: Tensor,
    pattern: Pattern,
    sizes: Tensor,
    budgets: Sequence[int],
) -> list[Tensor]:
    """Return ``E_b`` for each budget, by sparse products.

    Args:
        target: ``x``, shape ``(samples, d_in)``.
        values: activations at the entries of the pattern.
        rows: the decoder, shape ``(d_sae, d_in)``.
        bias: ``b_dec``.
        pattern: sample and latent of each activation.
        sizes: what the parts are ordered by, the largest first: their lengths, or the activations.
        budgets: the budgets, ascending.
    """
    rank = ranks(sizes, pattern)
    residual, errors, used = target - bias, list[Tensor](), 0
    for budget in budgets:
        added = ((rank >= used) & (rank < budget)).nonzero().squeeze(1)
        part = Pattern(pattern.rows[added], pattern.columns[added], pattern.shape)
        residual = residual - product(values[added], rows, part)
        errors.append(residual.square().sum() / len(target))
        used = budget
    return errors
