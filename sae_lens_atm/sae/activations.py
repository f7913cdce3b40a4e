"""ATM under each activation: what SAELens' own class of it needs to be told about masks."""

from dataclasses import replace

import torch
from sae_lens import BatchTopKTrainingSAE, JumpReLUTrainingSAE, StandardTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput, mse_loss
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.method.importance import Signals
from sae_lens_atm.method.selection import largest_positive
from sae_lens_atm.method.sparse import Pattern, dots_at, sparse_products_are_fast, squared_error
from sae_lens_atm.sae.atm_sae import ATMTrainingSAE
from sae_lens_atm.sae.config import ATMTrainingSAEConfig
from sae_lens_atm.sae.forward_pass import Seen, View, narrowed

_DENSE = 1 / 8  # from this share of active latents on, dense products are the faster
_LOOK_EVERY = 8  # steps between two looks at the full SAE, where all steps are masked


# SAELens' classes name their own config as the type of `cfg`; ATM's config inherits from each.
class BatchTopKATM(ATMTrainingSAE, BatchTopKTrainingSAE, activation="batchtopk"):  # pyright: ignore[reportGeneralTypeIssues]
    """ATM over SAELens' `batchtopk`: the masked view chooses its k again among the kept latents.

    Of the products of a step only the encoder's needs more than the active latents: the others are
    sparse ones (see `sparse`), with the same results up to rounding.
    """

    cfg: ATMTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    exact_buffers = ("topk_threshold",)

    @override
    def mask_acts(self, acts: Tensor, hidden_pre: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        masked_pre = hidden_pre * keep
        inherited = self.cfg.masked_choice == "inherited"
        return acts * keep if inherited else self.activation_fn(masked_pre), masked_pre

    @property
    def k(self) -> float:
        """k of this step."""
        cfg = self.cfg
        if cfg.k_start == 1 or not cfg.mask_end_step:
            return cfg.k
        part = min(self.tracker.clock() / cfg.mask_end_step, 1.0)
        return min(cfg.k * (cfg.k_start + (1 - cfg.k_start) * part), cfg.d_sae)

    # --- by sparse products ------------------------------------------------------------------

    def _is_sparse(self, x: Tensor) -> bool:
        cfg = self.cfg
        if cfg.kernels == "dense" or cfg.mask_granularity == "sample":
            return False
        if cfg.k / cfg.d_sae > _DENSE or self._is_hooked() or x.requires_grad:
            return False
        if self.mse_loss_fn is not mse_loss:
            return False
        return x.dim() == 2 and x.dtype == self.W_dec.dtype and sparse_products_are_fast(x)

    @override
    def full_view(self, step_input: TrainStepInput) -> View:
        if not self._is_sparse(step_input.sae_in):
            return super().full_view(step_input)
        x = self.process_sae_in(step_input.sae_in)
        length = self.get_W_dec_norm()
        pre = self._pre_activations(x, self.W_enc, self.b_enc, length)
        view = self._sparse_view(step_input, x, pre, length)
        return view._replace(full_acts=view.acts)

    @override
    def masked_view(self, step_input: TrainStepInput, keep: Tensor, full: View) -> View:
        if not full.acts.is_sparse:
            return super().masked_view(step_input, keep, full)
        x, length = self.process_sae_in(step_input.sae_in), self.get_W_dec_norm()
        pre = full.hidden_pre * keep
        if self.cfg.masked_choice == "again":
            return self._sparse_view(step_input, x, pre, length)
        acts = full.acts.coalesce()
        rows, columns = acts.indices()
        kept = keep[columns]
        inherited = (rows * len(keep) + columns)[kept], acts.values()[kept]
        return self._sparse_view(step_input, x, pre, length, inherited=inherited)

    @override
    def narrow_view(self, step_input: TrainStepInput, keep: Tensor) -> View:
        if not self._is_sparse(step_input.sae_in):
            if self.k > int(keep.sum()):  # SAELens' choice needs that many to choose among
                return self.view_under_mask(step_input, keep)
            return super().narrow_view(step_input, keep)
        if step_input.dead_neuron_mask is not None:
            step_input = replace(step_input, dead_neuron_mask=step_input.dead_neuron_mask & keep)
        kept = keep.nonzero().squeeze(1)
        x, length = self.process_sae_in(step_input.sae_in), self.get_W_dec_norm()
        pre = self._pre_activations(x, self.W_enc[:, kept], self.b_enc[kept], length[kept])
        return self._sparse_view(step_input, x, pre, length, kept)

    def choose(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Which pre-activations of a batch are kept; see `parallel` for a batch in parts."""
        return largest_positive(pre, int(self.k * len(pre)))

    @torch.no_grad()
    def _pre_activations(self, x: Tensor, encoder: Tensor, bias: Tensor, length: Tensor) -> Tensor:
        pre = torch.addmm(bias, x, encoder)
        return pre.mul_(length) if self.cfg.rescale_acts_by_decoder_norm else pre

    def _sparse_view(
        self,
        step_input: TrainStepInput,
        x: Tensor,
        pre: Tensor,
        length: Tensor,
        kept: Tensor | None = None,
        inherited: tuple[Tensor, Tensor] | None = None,
    ) -> View:
        """The view of the largest of these pre-activations (or of those at given places), whose
        columns are those latents."""
        width = pre.shape[1]
        places, chosen = inherited or self.choose(pre)
        columns = places % width
        columns = columns if kept is None else kept[columns]
        pattern = Pattern(places // width, columns, (len(x), self.cfg.d_sae))
        rescaled = self.cfg.rescale_acts_by_decoder_norm
        # Activations under the decoder as it is: by that of unit rows they are `chosen`.
        known = chosen / length[columns] if rescaled else chosen
        acts = dots_at(x, self.W_enc.T, pattern, self.b_enc, known)
        error, sae_out, aligned = squared_error(
            step_input.sae_in, acts, self.W_dec, self.b_dec, pattern
        )
        shown = pattern.coo(chosen)
        losses = self._with_others(error, step_input, shown, pre, sae_out)

        def seen() -> Seen:
            seen = _seen_sparsely(step_input.sae_in, acts, aligned, pattern, length, kept)
            # What is not finite is never chosen; the averages are to know of it all the same.
            return seen._replace(exposure=seen.exposure * error.detach().isfinite())

        return View(shown, pre, sae_out, losses, seen)

    # --- what SAELens learns beside the weights -----------------------------------------------

    @override
    def calculate_topk_aux_loss(
        self,
        sae_in: Tensor,
        sae_out: Tensor,
        hidden_pre: Tensor,
        dead_neuron_mask: Tensor | None,
    ) -> Tensor:
        """SAELens' auxiliary loss, of what dead latents would do if they fired: an activation is
        never negative. Without this they learn to explain the residual with the wrong sign."""
        whole = super().calculate_topk_aux_loss
        if hidden_pre.requires_grad or dead_neuron_mask is None or not dead_neuron_mask.any():
            return whole(sae_in, sae_out, hidden_pre.relu(), dead_neuron_mask)
        # A sparse view has no gradient of its pre-activations; those of the dead are made anew.
        dead = dead_neuron_mask.nonzero().squeeze(1)
        with narrowed(self, dead):
            pre = self.process_sae_in(sae_in) @ self.W_enc + self.b_enc
            if self.cfg.rescale_acts_by_decoder_norm:
                pre = pre * self.W_dec.norm(dim=-1)  # with a gradient, as SAELens has it
            return whole(sae_in, sae_out, pre.relu(), torch.ones_like(dead, dtype=torch.bool))

    @override
    def _after_view(self, step_input: TrainStepInput, view: View) -> None:
        """Move the threshold of inference, which is that of the full SAE."""
        acts, times = view.full_acts, 1
        if acts is None and self.cfg.schedule == "masked":
            times = _LOOK_EVERY
            if self.tracker.clock() % times == 0:
                blind = replace(step_input, dead_neuron_mask=None)
                with torch.no_grad():
                    acts = self.full_view(blind).acts
        if acts is not None:
            for _ in range(times):
                self.update_topk_threshold(acts)

    @override
    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        super().update_topk_threshold(acts_topk.values() if acts_topk.is_sparse else acts_topk)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if self.cfg.k_start != 1:
            self.activation_fn.k = self.k  # pyright: ignore[reportFunctionMemberAccess]
        output = super().training_forward_pass(step_input)
        output.metrics["topk_threshold"] = self.topk_threshold
        return output

    @override
    def _decoder(self) -> Tensor:
        if not self.cfg.rescale_acts_by_decoder_norm:
            return self.W_dec
        return self.W_dec / self.get_W_dec_norm().unsqueeze(1)


@torch.no_grad()
def _seen_sparsely(
    x: Tensor,
    acts: Tensor,
    aligned: Tensor,
    pattern: Pattern,
    length: Tensor,
    kept: Tensor | None,
) -> Seen:
    """What `seen_densely` computes, from the activations that are not 0."""
    lengths = acts * length[pattern.columns]
    squares = lengths.square()

    def mean(values: Tensor) -> Tensor:
        return pattern.sum_of_columns(values) / len(x)

    exposure = torch.ones_like(length, dtype=torch.float32)
    if kept is not None:
        exposure = torch.zeros_like(exposure).index_fill(0, kept, 1.0)
    return Seen(
        x,
        Signals(
            magnitude=mean(lengths),
            frequency=mean(torch.ones_like(acts)),
            contribution=mean(2 * acts * aligned + squares),
        ),
        mean(squares),
        lambda: pattern.transposed_matrix(lengths) @ x / len(x),
        exposure,
    )


class JumpReLUATM(ATMTrainingSAE, JumpReLUTrainingSAE, activation="jumprelu"):  # pyright: ignore[reportGeneralTypeIssues]
    """ATM over SAELens' `jumprelu`, whose penalty counts the kept latents only."""

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        self.threshold.data.clamp_(min=0.0)  # as SAELens' class does before each of its steps
        return super().training_forward_pass(step_input)

    @override
    def _dead_and_kept(self, dead: Tensor, keep: Tensor) -> Tensor:
        return dead & keep  # the pre-activation loss takes a mask per sample as well

    @property
    def _silent_pre(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        # Thresholds are not negative and their gradient reaches half a bandwidth to either side.
        return -self.bandwidth


class ReLUATM(ATMTrainingSAE, StandardTrainingSAE, activation="relu"):  # pyright: ignore[reportGeneralTypeIssues]
    """ATM over SAELens' `standard`, whose penalty counts the kept latents only."""
