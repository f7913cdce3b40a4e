"""The training class of "atm": SAELens' SAEs, trained under an importance mask.

`ATMTrainingSAE(cfg)` returns an instance of the subclass for ``cfg.activation``. The subclass
inherits activation, sparsity penalty, auxiliary loss and folding from SAELens' class.
"""

import math
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from numpy.typing import NDArray
from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.method.budgets import smaller_budgets
from sae_lens_atm.method.buffers import ExactBuffers
from sae_lens_atm.method.importance import ImportanceTracker, combine_signals, effective_latents
from sae_lens_atm.method.masking import (
    Mask,
    importance_threshold,
    mask_probability,
    ramp,
    sample_mask,
    uniform_at,
)
from sae_lens_atm.method.parents import ParentTracker, carried_energy
from sae_lens_atm.method.sparsity import frequency_weights
from sae_lens_atm.method.statistics import BatchStatistics
from sae_lens_atm.method.step_context import StepContext
from sae_lens_atm.sae.config import ATMTrainingSAEConfig
from sae_lens_atm.sae.forward_pass import ForwardPass, dense_pass

IMPORTANCE_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
# SAELens' losses that revive dead latents.
REVIVAL_LOSSES = ("auxiliary_reconstruction_loss",)
# The averages start this many time constants before parents are first needed.
PARENT_WARM_UP_TIME_CONSTANTS = 10
_MASK_STREAM = 0  # the stream of the mask's random numbers, see `uniform_at`
_TRAINING_ONLY = ("tracker.", "parent_tracker.")
_CLASS_OF_ACTIVATION: dict[str, type["ATMTrainingSAE"]] = {}


class ATMTrainingSAE(ExactBuffers, TrainingSAE[ATMTrainingSAEConfig]):
    """An SAE trained with Adaptive Temporal Masking.

    Each training step passes the batch through the full SAE. While masks are active it also passes
    the batch through the SAE without the masked latents. With ``w = masked_weight`` the loss is
    ``(1 - w) (L_full + L_budget) + w L_masked + L_revival + L_parent + L_frequency``: see
    `weighted_loss`, `budget_loss`, `parent_loss` and `frequency_loss`.

    In eval mode nothing is masked or updated, and the SAE equals the one that
    `save_inference_model` saves.
    """

    # The names `tracker` and `parent_tracker` are in every checkpoint.
    tracker: ImportanceTracker
    parent_tracker: ParentTracker | None
    context: StepContext = StepContext()
    """Reduces over processes and applies updates. Training replaces it where it needs to."""
    b_enc: torch.nn.Parameter

    def __init_subclass__(cls, activation: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _CLASS_OF_ACTIVATION[activation] = cls

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

    # --- training step -----------------------------------------------------------------------

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        cfg, mask = self.cfg, self.draw_mask()
        full = self.full_pass(step_input)
        losses = dict(full.losses)
        if cfg.budget_weight > 0 and self.is_active(0, cfg.budget_end_step):
            losses["budget_loss"] = self.budget_loss(full)
        loss = cast(Tensor, sum(losses.values()))
        measured, keep = full, torch.ones_like(mask.keep)
        if self.masks_are_active():
            masked = self.masked_pass(replace(step_input, dead_neuron_mask=None), full, mask.keep)
            loss = self.weighted_loss(losses, masked.losses)
            losses |= {f"masked_{name}": value for name, value in masked.losses.items()}
            if cfg.masked_weight == 1:  # measure the pass that is trained
                measured, keep = masked, mask.keep
        statistics = self.context.average(measured.statistics(keep))
        if cfg.frequency_penalty > 0 and self.is_active(0, cfg.frequency_penalty_end_step):
            losses["frequency_loss"] = self.frequency_loss(full)
            loss = loss + losses["frequency_loss"]
        if self.parent_tracker is not None and self.is_active(cfg.parent_start_step):
            losses["parent_loss"] = self.parent_loss(self.parent_tracker, statistics)
            loss = loss + losses["parent_loss"]
        self.after_full_pass(full)
        self.context.after_step(partial(self.update_averages, statistics))
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=full.sae_out,
            feature_acts=full.feature_acts,
            hidden_pre=full.hidden_pre,
            loss=loss,
            losses=losses,
            metrics=mask_metrics(mask, step_input.dead_neuron_mask),
        )

    def full_pass(self, step_input: TrainStepInput) -> ForwardPass:
        """Pass a batch through the SAE with all latents."""
        return dense_pass(self, step_input, *self.encode_with_hidden_pre(step_input.sae_in))

    def masked_pass(
        self, step_input: TrainStepInput, full: ForwardPass, keep: Tensor
    ) -> ForwardPass:
        """Pass the batch through the SAE without the masked latents. It is not encoded again."""
        return dense_pass(self, step_input, *self.mask_activations(full, keep))

    def mask_activations(self, full: ForwardPass, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Return activations and pre-activations under a mask."""
        return full.feature_acts * keep, full.hidden_pre * keep

    def weighted_loss(self, full: dict[str, Tensor], masked: dict[str, Tensor]) -> Tensor:
        """Return ``(1 - w) (L_full + L_budget) + w L_masked + L_revival``.

        Dead latents are revived by the full pass alone, at full weight.

        Args:
            full: the losses of the full pass, with the loss on smaller budgets if it is on.
            masked: the losses of the masked pass.
        """
        w = self.cfg.masked_weight
        revival = sum(value for name, value in full.items() if name in REVIVAL_LOSSES)
        fit = sum(value for name, value in full.items() if name not in REVIVAL_LOSSES)
        masked_loss = w * sum(masked.values())
        # At w = 1, (1 - w) * fit would cost a backward pass, and is NaN if fit is infinite.
        loss = masked_loss if w == 1 else (1 - w) * fit + masked_loss
        return cast(Tensor, loss + revival)

    def after_full_pass(self, full: ForwardPass) -> None:
        """Queue updates of the activation function, for subclasses."""

    def is_active(self, start: int, end: float = math.inf) -> bool:
        """Return whether this step is in ``[start, end)``, to skip work that is not needed.

        Under `torch.compile` the step is unknown and the result is True. The terms that depend on
        it are then zero outside ``[start, end)``.
        """
        return torch.compiler.is_compiling() or start <= self.tracker.clock() < end

    # --- importance and mask -----------------------------------------------------------------

    @property
    def importance(self) -> Tensor:
        """``Importance_i``, shape ``(d_sae,)``; its mean over the latents is 1.

        It is smaller if a signal is 0 for all latents, as before the first step.
        """
        return combine_signals(self.tracker.averages(), self.cfg.signal_weights)

    def masks_are_active(self) -> bool:
        """Return whether this step masks latents."""
        cfg = self.cfg
        end = cfg.mask_end_step if cfg.mask_end < 1 else math.inf
        switched_on = cfg.mask_rate > 0 and cfg.masked_weight > 0
        return switched_on and self.is_active(cfg.mask_warm_up_steps, end)

    @torch.no_grad()
    def draw_mask(self) -> Mask:
        """Draw the mask of this step. It keeps all latents while masks are not active."""
        cfg, steps, importance = self.cfg, self.tracker.steps, self.importance
        c = cfg.c_start + (cfg.c_end - cfg.c_start) * ramp(steps, cfg.mask_end_step)
        threshold = importance_threshold(importance, c)
        probability = mask_probability(importance, threshold, cfg.mask_rate)
        probability = probability * (steps >= cfg.mask_warm_up_steps)
        if cfg.mask_end < 1:
            probability = probability * (steps < cfg.mask_end_step)
        uniform = uniform_at(steps, cfg.mask_seed, _MASK_STREAM, (cfg.d_sae,))
        return Mask(sample_mask(probability, uniform), probability, threshold, importance, c)

    @torch.no_grad()
    def update_averages(self, statistics: BatchStatistics) -> None:
        """Update the averages with the statistics of one batch, and count the step."""
        cfg = self.cfg
        if self.parent_tracker is not None:
            time_constant = 1 / (1 - cfg.importance_decay)
            start = cfg.parent_start_step - round(PARENT_WARM_UP_TIME_CONSTANTS * time_constant)
            if self.is_active(start):
                self.parent_tracker.update(
                    statistics.inputs(),
                    statistics.signals.magnitude,
                    statistics.mean_input,
                    statistics.measured & (self.tracker.steps >= start),
                )
        self.tracker.update(statistics.signals, statistics.measured)

    def frequency_loss(self, full: ForwardPass) -> Tensor:
        """Return ``frequency_penalty * sum_i v_i E[a_i |d_i|]``, with `frequency_weights` ``v``."""
        cfg, weights = self.cfg, frequency_weights(self.tracker.averages())
        active = self.tracker.steps < cfg.frequency_penalty_end_step
        return cfg.frequency_penalty * full.weighted_length(weights * active)

    def budget_loss(self, full: ForwardPass) -> Tensor:
        """Return ``budget_weight * (mean_b E_b - L)``; the budgets ``b`` include k itself."""
        cfg, error = self.cfg, full.losses["mse_loss"]
        errors = [*full.budget_errors(smaller_budgets(cfg.k)), error]
        excess = torch.stack(errors).mean() - error
        return cfg.budget_weight * excess * (self.tracker.steps < cfg.budget_end_step)

    # --- pressure on children ----------------------------------------------------------------

    def parent_loss(self, parents: ParentTracker, statistics: BatchStatistics) -> Tensor:
        """Return ``parent_weight`` times the energy that children add along their parents."""
        cfg, steps = self.cfg, self.tracker.steps
        size = min(cfg.parent_rows, cfg.d_sae)
        rows = (torch.arange(size, device=steps.device) + steps * size) % cfg.d_sae
        parents.update_parents(rows, self.W_dec, self.importance, cfg.parent_tau, cfg.parent_chance)
        energy = statistics.energy * (steps >= cfg.parent_start_step)
        return cfg.parent_weight * carried_energy(self.W_dec, parents.parents, energy)

    def decoder_rows(self) -> Tensor:
        """Return the rows that activations multiply in the reconstruction, ``(d_sae, d_in)``."""
        return self.W_dec

    # --- inference, saving, loading ----------------------------------------------------------

    @override
    def log_histograms(self) -> dict[str, NDArray[Any]]:
        return {**super().log_histograms(), "weights/importance": self.importance.cpu().numpy()}

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
        """Return the tensors of the stock `jumprelu` SAE that this SAE is saved as."""
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
        parents = state_dict.get("parent_tracker.parents")
        if parents is not None and parents.dtype in (torch.float16, torch.bfloat16):
            parents.fill_(-1)  # rounded indices; training searches for parents again
        super().process_state_dict_for_loading(state_dict)

    @override
    def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save a stock `jumprelu` SAE.

        Its metadata holds the training configuration and quantiles of the importance. Only
        checkpoints (`save_model`) hold the importance of each latent.
        """
        steps, schedule = int(self.tracker.steps), self.cfg.schedule_steps
        if 0 < steps < 0.9 * schedule:
            warnings.warn(
                f"this SAE was trained for {steps} of schedule_steps = {schedule}: set "
                "schedule_steps to the number of training steps",
                stacklevel=2,
            )
        quantiles = self.importance.quantile(torch.tensor(IMPORTANCE_QUANTILES, device=self.device))
        self.cfg.metadata.importance_quantiles = dict(
            zip(map(str, IMPORTANCE_QUANTILES), quantiles.tolist(), strict=True)
        )
        return super().save_inference_model(path)


def mask_metrics(mask: Mask, dead: Tensor | None) -> dict[str, Any]:
    """Return the metrics of one step's mask. Callables are evaluated only when SAELens logs."""
    importance = mask.importance
    quantiles = {
        f"importance_q{round(100 * q)}": partial(importance.quantile, q)
        for q in IMPORTANCE_QUANTILES
    }
    return {
        "importance_threshold": mask.threshold,
        "importance_mean": importance.mean,
        "importance_effective_latents": partial(effective_latents, importance),
        **quantiles,
        "mask_c": mask.c,
        "mask_probability": mask.probability.mean,
        "masked_fraction": lambda: 1 - mask.keep.float().mean(),
        "alive_latents": lambda: len(importance) - (0 if dead is None else int(dead.sum())),
    }
