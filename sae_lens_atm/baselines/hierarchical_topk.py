"""HierarchicalTopK: one TopK SAE that is trained for every number of active latents up to k.

Balagansky, Aksenov, Laptev, Kurochkin, Gerasimov, Koryagin, Gavrilov: *Train One Sparse Autoencoder
Across Multiple Sparsity Budgets to Preserve Interpretability and Accuracy*, arXiv:2505.24473. With
the K largest activations in falling order, z_(1) >= ... >= z_(K), of latents with decoder rows
d_(1), ..., d_(K):

    x_j = b_dec + sum_{i <= j} z_(i) d_(i)
    L = 1/K sum_{j=1..K} |x - x_j|^2 + alpha L_aux

The saved SAE works at every budget up to K: set its `k`.

The paper leaves open the auxiliary loss: here SAELens' own, on the error of all K latents.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from sae_lens import (
    SAEConfig,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    register_sae_training_class,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK
from torch import Tensor
from torch.autograd import Function
from typing_extensions import Self, override

from sae_lens_atm.baselines.shared import require, require_one_scale


@dataclass
class HierarchicalTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """Configuration of a HierarchicalTopK SAE.

    Args:
        k: active latents of the SAE in evaluation, and of the saved SAE.
        max_k: K, the largest budget of training. None is k. SAEs that differ in k alone, and have
            the same max_k, are trained to the same weights.
    """

    max_k: int | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return "hierarchical_topk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig

    @property
    def budgets(self) -> int:
        """K, the number of budgets in training."""
        return self.k if self.max_k is None else self.max_k

    @override
    def __post_init__(self) -> None:
        allowed = f"from k = {self.k} to d_sae = {self.d_sae}"
        require(self, "max_k", self.max_k is None or self.k <= self.max_k <= self.d_sae, allowed)
        require(self, "use_sparse_activations", not self.use_sparse_activations, "false")
        require_one_scale(self, or_whitening=True)
        super().__post_init__()


class HierarchicalTopKTrainingSAE(TopKTrainingSAE):
    """A HierarchicalTopK SAE. It is saved as SAELens' `topk`."""

    cfg: HierarchicalTopKTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def train(self, mode: bool = True) -> Self:
        cast(TopK, self.activation_fn).k = self.cfg.budgets if mode else self.cfg.k
        return super().train(mode)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        cast(TopK, self.activation_fn).k = self.cfg.budgets  # a new SAE is in training mode
        output = super().training_forward_pass(step_input)
        error = self.mean_error(step_input.sae_in, output.feature_acts)
        losses = {**output.losses, "mse_loss": error}
        return replace(output, loss=torch.stack(list(losses.values())).sum(), losses=losses)

    def mean_error(self, x: Tensor, acts: Tensor) -> Tensor:
        """Return the squared error, averaged over samples and budgets."""
        values, chosen = acts.topk(self.cfg.budgets, dim=-1)  # in falling order
        rows = self.W_dec
        if self.cfg.rescale_acts_by_decoder_norm:
            rows = rows / rows.norm(dim=-1, keepdim=True)
        error = budget_errors(
            (x - self.b_dec).flatten(0, -2), values.flatten(0, -2), rows, chosen.flatten(0, -2)
        )
        return error / values.numel()  # samples times budgets


class _BudgetErrors(Function):
    """`budget_errors`, one budget after the other.

    Automatic differentiation would store a reconstruction for each budget, which takes twice the
    time and K times the memory.
    """

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, values: Tensor, rows: Tensor, chosen: Tensor) -> Tensor:
        residual, total = x.clone(), x.new_zeros(())
        for j in range(values.shape[1]):
            residual.addcmul_(values[:, j, None], rows[chosen[:, j]], value=-1)
            total += residual.square().sum()
        ctx.save_for_backward(values, rows, chosen, residual)
        return total

    @staticmethod
    @override
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        values, rows, chosen, last = ctx.saved_tensors
        residual, later = last.clone(), torch.zeros_like(last)
        to_values, to_rows = torch.empty_like(values), torch.zeros_like(rows)
        for j in reversed(range(values.shape[1])):
            later += residual  # the sum of the residuals that latent j is in
            row, index = rows[chosen[:, j]], chosen[:, j]
            to_values[:, j] = -2 * (later * row).sum(1)
            to_rows.index_add_(0, index, later * values[:, j, None], alpha=-2)
            residual.addcmul_(values[:, j, None], row)
        scale = grad_outputs[0]
        return 2 * scale * later, scale * to_values, scale * to_rows, None


def budget_errors(x: Tensor, values: Tensor, rows: Tensor, chosen: Tensor) -> Tensor:
    """Return ``|x - sum_{i <= j} values_i rows_{chosen_i}|^2``, summed over samples and j.

    Args:
        x: samples, ``(batch, d_in)``.
        values: activations in the order in which they are added, ``(batch, K)``.
        rows: the decoder, ``(d_sae, d_in)``.
        chosen: the latent of each activation, ``(batch, K)``.
    """
    return _BudgetErrors.apply(x, values, rows, chosen)  # pyright: ignore[reportReturnType]


register_sae_training_class(
    "hierarchical_topk", HierarchicalTopKTrainingSAE, HierarchicalTopKTrainingSAEConfig
)
