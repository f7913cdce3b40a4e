"""ATM with each activation function: the subclasses of `ATMTrainingSAE`."""

from functools import partial
from typing import Any

import torch
from sae_lens import BatchTopKTrainingSAE, StandardTrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput, mse_loss
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.method.selection import largest_of_each
from sae_lens_atm.method.sparse import sparse_products_are_fast
from sae_lens_atm.sae.atm_sae import ATMTrainingSAE
from sae_lens_atm.sae.config import ATMTrainingSAEConfig
from sae_lens_atm.sae.forward_pass import ForwardPass, restricted_to, sparse_pass

_DENSE_SHARE = 1 / 8  # share of active latents above which dense products are faster


# SAELens' classes name their own config as the type of `cfg`; ATM's config inherits from each.
class BatchTopKATM(ATMTrainingSAE, BatchTopKTrainingSAE, activation="batchtopk"):  # pyright: ignore[reportGeneralTypeIssues]
    """ATM with SAELens' `batchtopk`. The masked pass chooses its k among the kept latents."""

    cfg: ATMTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    exact_buffers = ("topk_threshold",)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = super().training_forward_pass(step_input)
        output.metrics["topk_threshold"] = self.topk_threshold
        return output

    @override
    def get_activation_fn(self) -> BatchTopK:
        return self.limited(BatchTopK(self.cfg.k))

    def limited(self, activation_fn: BatchTopK) -> BatchTopK:
        """Make an activation function choose among the `candidates`."""
        activation_fn.register_forward_pre_hook(self._limit)  # a method, which can be copied
        return activation_fn

    def _limit(self, _module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (self.candidates(*args),)

    def candidates(self, pre: Tensor) -> Tensor:
        """Return the pre-activations among which those of the batch are chosen.

        Until ``cfg.per_sample_end`` all but the k largest of each sample are zero.
        """
        end = self.cfg.per_sample_end_step
        if end == 0 or not self.is_active(0, end):
            return pre
        (own,) = largest_of_each(pre, [max(round(self.cfg.k), 1)])
        if torch.compiler.is_compiling():
            return torch.where(self.tracker.steps < end, own, pre)
        return own

    @override
    def mask_activations(self, full: ForwardPass, keep: Tensor) -> tuple[Tensor, Tensor]:
        masked_pre = full.hidden_pre * keep
        return self.activation_fn(masked_pre), masked_pre

    @override
    def full_pass(self, step_input: TrainStepInput) -> ForwardPass:
        if not self.uses_sparse_kernels(step_input.sae_in):
            return super().full_pass(step_input)
        return sparse_pass(self, step_input, self.pre_activations(step_input.sae_in))

    @override
    def masked_pass(
        self, step_input: TrainStepInput, full: ForwardPass, keep: Tensor
    ) -> ForwardPass:
        if not full.feature_acts.is_sparse:
            return super().masked_pass(step_input, full, keep)
        return sparse_pass(self, step_input, full.hidden_pre * keep)

    @override
    def after_full_pass(self, full: ForwardPass) -> None:
        # The threshold is for inference, where nothing is masked.
        acts = full.feature_acts.values() if full.feature_acts.is_sparse else full.feature_acts
        smallest = self.context.minimum(acts.detach())
        self.context.after_step(partial(self.update_topk_threshold, smallest))

    def uses_sparse_kernels(self, x: Tensor) -> bool:
        """Return whether a step with this input uses sparse products after the encoder."""
        cfg = self.cfg
        if cfg.kernels == "dense" or cfg.k / cfg.d_sae > _DENSE_SHARE or x.requires_grad:
            return False
        if self._has_hooks() or self.mse_loss_fn is not mse_loss:
            return False
        return x.dim() == 2 and x.dtype == self.W_dec.dtype and sparse_products_are_fast(x)

    def _has_hooks(self) -> bool:
        # A hook expects the dense activations of all latents.
        points = ("sae_input", "sae_acts_pre", "sae_acts_post", "sae_recons")
        return any(getattr(self, f"hook_{point}").has_hooks() for point in points)

    @torch.no_grad()
    def pre_activations(self, x: Tensor) -> Tensor:
        """Return the pre-activations of a batch, without gradient."""
        pre = torch.addmm(self.b_enc, self.process_sae_in(x), self.W_enc)
        return pre.mul_(self.get_W_dec_norm()) if self.cfg.rescale_acts_by_decoder_norm else pre

    @override
    def decoder_rows(self) -> Tensor:
        if not self.cfg.rescale_acts_by_decoder_norm:
            return self.W_dec
        return self.W_dec / self.get_W_dec_norm().unsqueeze(1)

    @override
    def calculate_topk_aux_loss(
        self,
        sae_in: Tensor,
        sae_out: Tensor,
        hidden_pre: Tensor,
        dead_neuron_mask: Tensor | None,
    ) -> Tensor:
        """Return SAELens' auxiliary loss with the activations of `revival_activations`."""
        auxiliary_loss: Any = super().calculate_topk_aux_loss
        if hidden_pre.requires_grad or dead_neuron_mask is None or not dead_neuron_mask.any():
            acts = self.revival_activations(hidden_pre)
            return auxiliary_loss(sae_in, sae_out, acts, dead_neuron_mask)
        # The pre-activations of a sparse pass have no gradient. Compute those of the dead latents.
        dead = dead_neuron_mask.nonzero().squeeze(1)
        with restricted_to(self, dead):
            pre = self.process_sae_in(sae_in) @ self.W_enc + self.b_enc
            if self.cfg.rescale_acts_by_decoder_norm:
                pre = pre * self.W_dec.norm(dim=-1)  # with a gradient, as in SAELens
            everything = torch.ones_like(dead, dtype=torch.bool)
            return auxiliary_loss(sae_in, sae_out, self.revival_activations(pre), everything)

    def revival_activations(self, pre: Tensor) -> Tensor:
        """Return the activations with which dead latents explain the residual.

        They are ``max(pre, 0)`` for a latent that is positive somewhere in the batch. Negative
        activations, as in SAELens, would fit the residual in a way that inference does not allow.
        A latent that is negative on the whole batch would then get no gradient and stay dead. Its
        activations are ``aux_negative_slope * pre``.
        """
        positive = self.context.anywhere((pre > 0).flatten(0, -2).any(0))
        return torch.where(positive, pre.relu(), self.cfg.aux_negative_slope * pre)


class ReLUATM(ATMTrainingSAE, StandardTrainingSAE, activation="relu"):  # pyright: ignore[reportGeneralTypeIssues]
    """ATM with SAELens' `standard`: ReLU and an L1 penalty on the kept latents."""
