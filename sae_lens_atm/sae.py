"""The "atm" architecture: SAELens' SAEs, trained under an importance mask, saved as stock ones.

`ATMTrainingSAE` is one class to its users. Making one returns the subclass for `cfg.activation`,
which inherits the activation, its penalty, auxiliary loss and folding from SAELens' own class.
"""

import math
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from numpy.typing import NDArray
from sae_lens import (
    BatchTopKTrainingSAE,
    JumpReLUTrainingSAE,
    StandardTrainingSAE,
    TrainingSAE,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.config import ATMTrainingSAEConfig
from sae_lens_atm.importance import (
    ExactBuffers,
    ImportanceTracker,
    batch_signals,
    combine_signals,
)
from sae_lens_atm.masking import (
    Mask,
    importance_threshold,
    mask_probability,
    ramp,
    sample_mask,
    uniform_at,
)
from sae_lens_atm.parents import ParentTracker, carried_energy, implied_parents, unit_rows

_MASK, _COIN, _C = 0, 1, 2  # independent streams of the mask's random numbers
IMPORTANCE_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
# Losses of SAELens' that revive dead latents: the full view alone has them, at full weight.
_REVIVAL = ("auxiliary_reconstruction_loss", "pre_act_loss")
_AVERAGED_OVER = 10  # parents are told from averages this many times as long as their decay's
# What SAELens' run-time normalisations leave on the SAE between encode and decode.
_NORMALISATION_STATE = ("x_norm_coeff", "ln_mu", "ln_std")
_TRAINING_ONLY = ("tracker.", "parent_tracker.")


class _Seen(NamedTuple):
    """One batch as the averages see it."""

    x: Tensor
    acts: Tensor
    residual: Tensor
    exposure: Tensor


class ATMTrainingSAE(ExactBuffers, TrainingSAE[ATMTrainingSAEConfig]):
    """A SAE trained under Adaptive Temporal Masking.

    Each training step draws a mask from the latents' importance so far, computes the loss of the
    full SAE, of the masked one, or of both (`cfg.schedule`), and updates the importance. Later in
    training nothing is masked, and children are kept off their parents (`parents`). Nothing is
    masked or updated in eval mode, where the SAE is the one that `save_inference_model` saves.
    """

    tracker: ImportanceTracker
    parent_tracker: ParentTracker | None
    b_enc: torch.nn.Parameter

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is not ATMTrainingSAE:
            return super().__new__(cls)
        cfg: ATMTrainingSAEConfig = args[0] if args else kwargs["cfg"]
        return super().__new__(cast(Any, _CLASS_OF_ACTIVATION[cfg.activation]))

    def __init__(self, cfg: ATMTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.tracker = ImportanceTracker(cfg.d_sae, cfg.importance_decay, self.device)
        self.parent_tracker = None
        if cfg.parent_weight > 0:
            self.parent_tracker = ParentTracker(
                cfg.d_in, cfg.d_sae, cfg.importance_decay, self.device
            )

    # --- importance and mask ---------------------------------------------------------------

    @property
    def importance(self) -> Tensor:
        """``Importance_i``, shape ``(d_sae,)``, free of units; its mean is 1 for "sum"."""
        averages = self.tracker.averages()
        return combine_signals(averages, self.cfg.signal_weights, self.cfg.importance_combine)

    @property
    def c(self) -> Tensor:
        """``c`` of this step, by `c_course`."""
        cfg, steps = self.cfg, self.tracker.steps
        if cfg.c_course == "uniform":
            part = uniform_at(steps, cfg.mask_seed, _C, ())
        else:
            part = ramp(steps, 0, cfg.mask_end_step)
        return cfg.c_start + (cfg.c_end - cfg.c_start) * part

    @torch.no_grad()
    def draw_mask(self, batch_size: int) -> Mask:
        """The mask of this step, and what it was drawn from.

        On the full steps of the interleaved schedule, and when masking is over, all is kept.
        """
        cfg, steps = self.cfg, self.tracker.steps
        importance, c = self.importance, self.c
        threshold = importance_threshold(importance, c)
        probability = mask_probability(importance, threshold, cfg.mask_rate)
        probability = probability * ramp(steps, cfg.mask_warm_up_steps, cfg.mask_ramp_steps)
        if cfg.mask_end < 1:
            probability = probability * (steps < cfg.mask_end_step)
        if cfg.schedule == "interleaved":
            coin = uniform_at(steps, cfg.mask_seed, _COIN, (1,))
            probability = torch.where(coin < cfg.masked_probability, probability, 0.0)
        width = cfg.d_sae if cfg.mask_draw == "independent" else 1
        shape = (batch_size, width) if cfg.mask_granularity == "sample" else (width,)
        keep = sample_mask(probability, uniform_at(steps, cfg.mask_seed, _MASK, shape))
        return Mask(keep, probability, threshold, importance, c)

    def mask_view(self, acts: Tensor, hidden_pre: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and pre-activations of the SAE without the masked latents.

        A masked latent's pre-activation is moved to where neither activation nor penalty of it
        has a value or a gradient.
        """
        return acts * keep, hidden_pre.where(keep, self._silent_pre)

    def _dead_and_kept(self, dead: Tensor, keep: Tensor) -> Tensor:
        # SAELens' auxiliary loss wants one mask for the batch; under masks per sample the masked
        # pre-activations, which are 0, keep the masked latents out of it.
        return dead & keep if keep.dim() == 1 else dead

    # A pre-activation at which a latent is silent, out of reach of any straight-through gradient.
    _silent_pre: float = 0.0

    # --- training --------------------------------------------------------------------------

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        cfg = self.cfg
        mask = self.draw_mask(step_input.sae_in.shape[0])
        keep = mask.keep

        acts, hidden_pre = self.encode_with_hidden_pre(step_input.sae_in)
        if cfg.schedule == "dual":
            sae_out, losses, loss = self._dual_losses(step_input, acts, hidden_pre, keep)
            everywhere = torch.ones_like(mask.importance)
            seen = self._seen(step_input.sae_in, acts, sae_out, everywhere)
        else:
            masked_acts, masked_pre = self.mask_view(acts, hidden_pre, keep)
            dead = step_input.dead_neuron_mask
            dead = None if dead is None else self._dead_and_kept(dead, keep)
            view = replace(step_input, dead_neuron_mask=dead)
            sae_out, losses = self._view_losses(view, masked_acts, masked_pre)
            loss = sum(losses.values())
            exposure = keep.float() if keep.dim() == 1 else keep.float().mean(0)
            seen = self._seen(step_input.sae_in, masked_acts, sae_out, exposure)
            if step_input.is_logging_step:  # explained variance is logged of the SAE we will save
                with torch.no_grad():
                    sae_out = self._decode_again(acts)
        if self._in_force(cfg.parent_start_step) and self.parent_tracker is not None:
            losses["parent_loss"] = self.parent_loss(self.parent_tracker, seen)
            loss = loss + losses["parent_loss"]
        self._update_averages(seen)

        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            # Of the full SAE, so that SAELens does not take a masked latent for a dead one.
            feature_acts=acts,
            hidden_pre=hidden_pre,
            loss=cast(Tensor, loss),
            losses=losses,
            metrics=_mask_metrics(mask, step_input.dead_neuron_mask),
        )

    def _in_force(self, start: int, end: float = math.inf) -> bool:
        """Whether something that is in force in these steps is so now, so as not to compute it
        where it is not. Always true while compiling, when the step is not known: all that this
        guards comes to nothing outside of those steps in any case."""
        return torch.compiler.is_compiling() or start <= int(self.tracker.steps) < end

    def _dual_losses(
        self, step_input: TrainStepInput, acts: Tensor, hidden_pre: Tensor, keep: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Reconstruction of the full view, the losses of both, and the loss of the step."""
        cfg = self.cfg
        sae_out, losses = self._view_losses(step_input, acts, hidden_pre)
        end = cfg.mask_end_step if cfg.mask_end < 1 else math.inf
        if cfg.mask_rate == 0 or not self._in_force(cfg.mask_warm_up_steps, end):
            return sae_out, losses, cast(Tensor, sum(losses.values()))
        # Dead latents are revived by what the full SAE leaves over, not by what a mask hides.
        blind = replace(step_input, dead_neuron_mask=None)
        _, masked = self._view_losses(blind, *self.mask_view(acts, hidden_pre, keep))
        revival = sum(losses[name] for name in _REVIVAL if name in losses)
        full = sum(loss for name, loss in losses.items() if name not in _REVIVAL)
        weight = cfg.masked_weight
        loss = (1 - weight) * full + weight * sum(masked.values()) + revival
        return sae_out, losses | {f"masked_{k}": v for k, v in masked.items()}, cast(Tensor, loss)

    def _view_losses(
        self, step_input: TrainStepInput, acts: Tensor, hidden_pre: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction of one view, and its losses: squared error, penalties, auxiliary loss."""
        sae_out = self._decode_again(acts)
        squared_error = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
        others = self.calculate_aux_loss(
            step_input=step_input, feature_acts=acts, hidden_pre=hidden_pre, sae_out=sae_out
        )
        assert isinstance(others, dict)
        return sae_out, {"mse_loss": squared_error, **others}

    def _decode_again(self, acts: Tensor) -> Tensor:
        """Decode without using up what encode left behind for undoing a normalisation."""
        state = self._normalisation_state()
        sae_out = self.decode(acts)
        for name, value in state.items():
            setattr(self, name, value)
        return sae_out

    def _normalisation_state(self) -> dict[str, Tensor]:
        return {n: getattr(self, n) for n in _NORMALISATION_STATE if hasattr(self, n)}

    def _seen(self, x: Tensor, acts: Tensor, sae_out: Tensor, exposure: Tensor) -> "_Seen":
        """What the averages are taken of, in the units of the reconstruction."""
        state = self._normalisation_state()
        if "ln_std" in state:
            acts = acts * state["ln_std"]
        elif "x_norm_coeff" in state:
            acts = acts / state["x_norm_coeff"]
        return _Seen(x, acts.detach(), (x - sae_out).detach(), exposure)

    @torch.no_grad()
    def _update_averages(self, seen: "_Seen") -> None:
        if self.parent_tracker is not None:
            start = self.cfg.parent_start_step - round(
                _AVERAGED_OVER / (1 - self.cfg.importance_decay)
            )
            if self._in_force(start):
                length = self._decoder().norm(dim=-1)
                exposure = seen.exposure * (self.tracker.steps >= start)
                self.parent_tracker.update(seen.acts * length, seen.x, exposure)
        signals = batch_signals(seen.acts, self._decoder(), seen.residual)
        self.tracker.update(signals, seen.exposure)

    def parent_loss(self, parents: ParentTracker, seen: "_Seen") -> Tensor:
        """`parent_weight` times the energy that children add along the parents they imply."""
        cfg, steps = self.cfg, self.tracker.steps
        size = min(cfg.parent_rows, cfg.d_sae)
        rows = (torch.arange(size, device=steps.device) + steps * size) % cfg.d_sae
        directions = unit_rows(self.W_dec)
        with torch.no_grad():
            implied = implied_parents(
                parents.lift(directions, rows),
                self.tracker.averages(),
                self.importance,
                rows,
                cfg.parent_tau,
            )
            length = self._decoder().norm(dim=-1)
            share = size / cfg.d_sae * seen.exposure.clamp(min=1e-12)
            energy = ((seen.acts * length).square().mean(0) / share)[rows]
            energy = energy * (steps >= cfg.parent_start_step)
        return cfg.parent_weight * carried_energy(directions[rows], directions, implied, energy)

    def _decoder(self) -> Tensor:
        """The rows that activations multiply in the reconstruction."""
        return self.W_dec

    @override
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        return {**super().log_histograms(), "weights/importance": self.importance.cpu().numpy()}

    # --- inference, saving, loading ----------------------------------------------------------

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            return super().encode_with_hidden_pre(x)  # pyright: ignore[reportAbstractUsage]
        weights = self.inference_state()
        hidden_pre = self.process_sae_in(x) @ weights["W_enc"] + weights["b_enc"]
        hidden_pre = self.hook_sae_acts_pre(hidden_pre)
        fires = (hidden_pre > weights["threshold"]).to(hidden_pre.dtype)
        return self.hook_sae_acts_post(hidden_pre.relu() * fires), hidden_pre

    @override
    def decode(self, feature_acts: Tensor) -> Tensor:
        if self.training:
            return super().decode(feature_acts)
        sae_out = self.hook_sae_recons(feature_acts @ self.inference_state()["W_dec"] + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(sae_out), self.d_head)

    @torch.no_grad()
    def inference_state(self) -> dict[str, Tensor]:
        """The tensors of the stock `jumprelu` SAE that this SAE is saved as, in its own dtype."""
        state = self.state_dict()
        self.process_state_dict_for_saving_inference(state)
        return {name: tensor.to(self.dtype) for name, tensor in state.items()}

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        for name in [name for name in state_dict if name.startswith(_TRAINING_ONLY)]:
            del state_dict[name]
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict.setdefault("threshold", torch.zeros_like(state_dict["b_enc"]))

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        # SAELens' loaders cast every tensor to the SAE's dtype, counters too.
        super().process_state_dict_for_loading(state_dict)
        for name, buffer in self.named_buffers():
            if name in state_dict:
                state_dict[name] = state_dict[name].to(buffer.dtype)

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save a stock `jumprelu` SAE. How it was trained is in its metadata, with a summary of
        the importance scores; the scores themselves are in checkpoints (`save_model`)."""
        steps, schedule = int(self.tracker.steps), self.cfg.schedule_steps
        if 0 < steps < 0.9 * schedule:
            warnings.warn(
                f"this SAE was trained for {steps} of the {schedule} steps of its schedule: set "
                "schedule_steps to the length of the training",
                stacklevel=2,
            )
        quantiles = self.importance.quantile(torch.tensor(IMPORTANCE_QUANTILES, device=self.device))
        self.cfg.metadata.importance_quantiles = dict(
            zip(map(str, IMPORTANCE_QUANTILES), quantiles.tolist(), strict=True)
        )
        return super().save_inference_model(path)


def _mask_metrics(mask: Mask, dead: Tensor | None) -> dict[str, Any]:
    """Metrics of one step's mask, computed only where SAELens logs them."""
    importance = mask.importance
    quantiles = {
        f"importance_q{round(100 * q)}": partial(importance.quantile, q)
        for q in IMPORTANCE_QUANTILES
    }
    return {
        "importance_threshold": mask.threshold,
        "importance_mean": importance.mean,
        **quantiles,
        "mask_c": mask.c,
        "mask_probability": mask.probability.mean,
        "masked_fraction": lambda: 1 - mask.keep.float().mean(),
        "alive_latents": lambda: len(importance) - (0 if dead is None else int(dead.sum())),
    }


# SAELens' classes name their own config as the type of `cfg`; ATM's config inherits from each.
class _BatchTopKATM(ATMTrainingSAE, BatchTopKTrainingSAE):  # pyright: ignore[reportGeneralTypeIssues]
    """ATM over SAELens' `batchtopk`: the masked view chooses its k again among the kept latents."""

    exact_buffers = ("topk_threshold",)

    @override
    def mask_view(self, acts: Tensor, hidden_pre: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        masked_pre = hidden_pre * keep
        return self.activation_fn(masked_pre), masked_pre

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
        return super().calculate_topk_aux_loss(sae_in, sae_out, hidden_pre.relu(), dead_neuron_mask)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = super().training_forward_pass(step_input)
        self.update_topk_threshold(output.feature_acts)  # of the full SAE, as at inference
        output.metrics["topk_threshold"] = self.topk_threshold
        return output

    @override
    def _decoder(self) -> Tensor:
        if not self.cfg.rescale_acts_by_decoder_norm:
            return self.W_dec
        return self.W_dec / self.get_W_dec_norm().unsqueeze(1)


class _JumpReLUATM(ATMTrainingSAE, JumpReLUTrainingSAE):  # pyright: ignore[reportGeneralTypeIssues]
    """ATM over SAELens' `jumprelu`, whose penalty counts the kept latents only."""

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        with torch.no_grad():  # as SAELens' class does before each of its steps
            self.threshold.clamp_(min=0.0)
        return super().training_forward_pass(step_input)

    @override
    def _dead_and_kept(self, dead: Tensor, keep: Tensor) -> Tensor:
        return dead & keep  # the pre-activation loss takes a mask per sample as well

    @property
    def _silent_pre(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        # Thresholds are not negative and their gradient reaches half a bandwidth to either side.
        return -self.bandwidth


class _ReLUATM(ATMTrainingSAE, StandardTrainingSAE):  # pyright: ignore[reportGeneralTypeIssues]
    """ATM over SAELens' `standard`, whose penalty counts the kept latents only."""


_CLASS_OF_ACTIVATION: dict[str, type[ATMTrainingSAE]] = {
    "batchtopk": _BatchTopKATM,
    "jumprelu": _JumpReLUATM,
    "relu": _ReLUATM,
}
