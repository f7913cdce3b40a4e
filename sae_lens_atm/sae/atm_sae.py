"""The "atm" architecture: SAELens' SAEs, trained under an importance mask, saved as stock ones.

`ATMTrainingSAE` is one class to its users. Making one returns the subclass for `cfg.activation`,
which inherits the activation, its penalty, auxiliary loss and folding from SAELens' own class.
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

from sae_lens_atm.method.importance import (
    ExactBuffers,
    ImportanceTracker,
    combine_signals,
    effective_latents,
)
from sae_lens_atm.method.masking import (
    Mask,
    importance_threshold,
    mask_probability,
    ramp,
    sample_mask,
    uniform_at,
)
from sae_lens_atm.method.parents import ParentTracker, carried_energy
from sae_lens_atm.sae.config import ATMTrainingSAEConfig
from sae_lens_atm.sae.forward_pass import Seen, View, narrowed, seen_densely

_MASK, _COIN, _C = 0, 1, 2  # independent streams of the mask's random numbers
IMPORTANCE_QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
# Losses of SAELens' that revive dead latents: the full view alone has them, at full weight.
_REVIVAL = ("auxiliary_reconstruction_loss", "pre_act_loss")
_AVERAGED_OVER = 10  # parents are told from averages this many times as long as their decay's
# What SAELens' run-time normalisations leave on the SAE between encode and decode.
_NORMALISATION_STATE = ("x_norm_coeff", "ln_mu", "ln_std")
_FOUND_AGAIN = ("parent_tracker.parents", "parent_tracker.own_lift")
_TRAINING_ONLY = ("tracker.", "parent_tracker.")


# Of each activation, the class that inherits it from SAELens; see `activations`.
_CLASS_OF_ACTIVATION: dict[str, type["ATMTrainingSAE"]] = {}


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

    def mask_acts(self, acts: Tensor, hidden_pre: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
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
        if cfg.schedule == "dual":
            view = self.full_view(step_input)
            losses, loss = self._dual_losses(step_input, view, mask.keep)
        else:
            view = self._single_view(step_input, mask.keep)
            losses, loss = view.losses, cast(Tensor, sum(view.losses.values()))
        seen = self.seen_of(view)
        if self._in_force(cfg.parent_start_step) and self.parent_tracker is not None:
            losses["parent_loss"] = self.parent_loss(self.parent_tracker, seen)
            loss = loss + losses["parent_loss"]
        self._after_view(step_input, view)
        self._update_averages(seen)

        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=view.sae_out,
            feature_acts=view.acts,
            hidden_pre=view.hidden_pre,
            loss=loss,
            losses=losses,
            metrics={
                **_mask_metrics(mask, step_input.dead_neuron_mask),
                "l0_unmasked": partial(self._l0_unmasked, seen),
            },
        )

    def seen_of(self, view: View) -> Seen:
        """What the averages see of a view; see `parallel` for a batch in parts."""
        return view.seen()

    def _in_force(self, start: int, end: float = math.inf) -> bool:
        """Whether something that is in force in these steps is so now, so as not to compute it
        where it is not. Always true while compiling, when the step is not known: all that this
        guards comes to nothing outside of those steps in any case."""
        return torch.compiler.is_compiling() or start <= self.tracker.clock() < end

    def _can_mask(self) -> bool:
        """Whether this step can mask anything."""
        cfg = self.cfg
        end = cfg.mask_end_step if cfg.mask_end < 1 else math.inf
        return cfg.mask_rate > 0 and self._in_force(cfg.mask_warm_up_steps, end)

    def _dual_losses(
        self, step_input: TrainStepInput, full: View, keep: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The losses of the full and of the masked view, and the loss of the step."""
        if not self._can_mask():
            return full.losses, cast(Tensor, sum(full.losses.values()))
        # Dead latents are revived by what the full SAE leaves over, not by what a mask hides.
        blind = replace(step_input, dead_neuron_mask=None)
        masked = self.masked_view(blind, keep, full).losses
        revival = sum(full.losses[name] for name in _REVIVAL if name in full.losses)
        others = sum(loss for name, loss in full.losses.items() if name not in _REVIVAL)
        weight = self.cfg.masked_weight
        loss = (1 - weight) * others + weight * sum(masked.values()) + revival
        named = {f"masked_{name}": loss for name, loss in masked.items()}
        return full.losses | named, cast(Tensor, loss)

    def _single_view(self, step_input: TrainStepInput, keep: Tensor) -> View:
        """The view of a step that has one, full or masked."""
        if keep.dim() == 2 or torch.compiler.is_compiling() or self._is_hooked():
            view = self.view_under_mask(step_input, keep)
        elif self._can_mask() and not keep.all():
            view = self.narrow_view(step_input, keep)
        else:
            view = self.full_view(step_input)
        if step_input.is_logging_step:  # explained variance is logged of the SAE we will save
            with torch.no_grad():
                view = view._replace(sae_out=self.full_view(step_input).sae_out)
        return view

    def _is_hooked(self) -> bool:
        """Whether someone looks at what a step computes, and expects all latents there."""
        return any(
            hook.has_hooks()
            for hook in (
                self.hook_sae_input,
                self.hook_sae_acts_pre,
                self.hook_sae_acts_post,
                self.hook_sae_recons,
            )
        )

    def full_view(self, step_input: TrainStepInput) -> View:
        """The view of the full SAE."""
        acts, hidden_pre = self.encode_with_hidden_pre(step_input.sae_in)
        view = self._view_of(step_input, acts, hidden_pre)
        return view._replace(full_acts=acts)

    def masked_view(self, step_input: TrainStepInput, keep: Tensor, full: View) -> View:
        """The view of the SAE without the masked latents, from that of the full SAE."""
        return self._masked(step_input, keep, full.acts, full.hidden_pre)

    def view_under_mask(self, step_input: TrainStepInput, keep: Tensor) -> View:
        """The same where there is none of the full SAE, by computing all and masking some."""
        dead = step_input.dead_neuron_mask
        if dead is not None:
            step_input = replace(step_input, dead_neuron_mask=self._dead_and_kept(dead, keep))
        return self._masked(step_input, keep, *self.encode_with_hidden_pre(step_input.sae_in))

    def _masked(
        self, step_input: TrainStepInput, keep: Tensor, acts: Tensor, hidden_pre: Tensor
    ) -> View:
        view = self._view_of(step_input, *self.mask_acts(acts, hidden_pre, keep), keep)
        # Of the full SAE, so that SAELens does not take a masked latent for a dead one.
        return view._replace(acts=acts, full_acts=acts)

    def narrow_view(self, step_input: TrainStepInput, keep: Tensor) -> View:
        """The view of the SAE without the masked latents, of which nothing is computed."""
        kept, size = keep.nonzero().squeeze(1), len(keep)
        dead = step_input.dead_neuron_mask
        dead = None if dead is None else dead[kept]
        with narrowed(self, kept):
            view = self.full_view(replace(step_input, dead_neuron_mask=dead))
            seen = view.seen().spread(kept, size)
        acts = view.acts.new_zeros(len(view.acts), size).index_copy(1, kept, view.acts.detach())
        return view._replace(acts=acts, full_acts=None, seen=lambda: seen)

    def _view_of(
        self,
        step_input: TrainStepInput,
        acts: Tensor,
        hidden_pre: Tensor,
        keep: Tensor | None = None,
    ) -> View:
        """A view of these activations: decoded, with its losses."""
        x = step_input.sae_in
        state = {n: getattr(self, n) for n in _NORMALISATION_STATE if hasattr(self, n)}
        sae_out = self.decode(acts)
        for name, value in state.items():  # decode has used up what encode left for it
            setattr(self, name, value)

        def seen() -> Seen:
            units = state.get("ln_std", 1.0) / state.get("x_norm_coeff", 1.0)
            kept = torch.ones_like(self.b_enc) if keep is None else keep
            exposure = kept.float() if kept.dim() == 1 else kept.float().mean(0)
            return seen_densely(x, acts * units, self._decoder(), sae_out, exposure)

        squared_error = self.mse_loss_fn(sae_out, x).sum(dim=-1).mean()
        losses = self._with_others(squared_error, step_input, acts, hidden_pre, sae_out)
        return View(acts, hidden_pre, sae_out, losses, seen)

    def _with_others(
        self,
        squared_error: Tensor,
        step_input: TrainStepInput,
        acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """The losses of a view: squared error, and what SAELens' class adds to it."""
        others = self.calculate_aux_loss(
            step_input=step_input, feature_acts=acts, hidden_pre=hidden_pre, sae_out=sae_out
        )
        assert isinstance(others, dict)
        return {"mse_loss": squared_error, **others}

    def _after_view(self, step_input: TrainStepInput, view: View) -> None:
        """What the activation learns from the view of a step."""

    @torch.no_grad()
    def _l0_unmasked(self, seen: Seen) -> Tensor:
        """The L0 of the full SAE: of latents that this step did not see, by their averages."""
        here = seen.signals.frequency / seen.exposure.clamp(min=1e-12)
        return here.where(seen.exposure > 0, self.tracker.averages().frequency).sum()

    @torch.no_grad()
    def _update_averages(self, seen: Seen) -> None:
        if self.parent_tracker is not None:
            start = self.cfg.parent_start_step - round(
                _AVERAGED_OVER / (1 - self.cfg.importance_decay)
            )
            if self._in_force(start):
                exposure = seen.exposure * (self.tracker.steps >= start)
                self.parent_tracker.update(
                    seen.inputs(),
                    seen.signals.magnitude,
                    seen.x.mean(0, dtype=torch.float32),
                    exposure,
                )
        self.tracker.update(seen.signals, seen.exposure)

    def parent_loss(self, parents: ParentTracker, seen: Seen) -> Tensor:
        """`parent_weight` times the energy that children add along the parents they imply."""
        cfg, steps = self.cfg, self.tracker.steps
        size = min(cfg.parent_rows, cfg.d_sae)
        rows = (torch.arange(size, device=steps.device) + steps * size) % cfg.d_sae
        parents.look_for_parents(rows, self.W_dec, self.importance, cfg.parent_tau)
        energy = seen.energy / seen.exposure.clamp(min=1e-12) * (steps >= cfg.parent_start_step)
        return cfg.parent_weight * carried_energy(self.W_dec, parents.parents, energy)

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
        parents = state_dict.get("parent_tracker.parents")
        if parents is not None and parents.dtype in (torch.float16, torch.bfloat16):
            parents.fill_(-1)  # indices that were rounded; they are found again
        for name, buffer in self.named_buffers():
            if name in state_dict:
                state_dict[name] = state_dict[name].to(buffer.dtype)
            elif name in _FOUND_AGAIN:  # checkpoints of earlier versions lack them
                state_dict[name] = buffer.clone()

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
        "importance_effective_latents": partial(effective_latents, importance),
        **quantiles,
        "mask_c": mask.c,
        "mask_probability": mask.probability.mean,
        "masked_fraction": lambda: 1 - mask.keep.float().mean(),
        "alive_latents": lambda: len(importance) - (0 if dead is None else int(dead.sum())),
    }
