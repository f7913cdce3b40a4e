"""Every SAE of a comparison at the same L0: set where there is a setting for it, steered to where
there is only something that the L0 follows."""

import math
from dataclasses import fields, replace
from typing import Any, NamedTuple

from sae_lens import SAETrainer, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.sae import TrainStepOutput

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.sae import forward_pass as view

L0_TOLERANCE = 0.05
"""A run further off its target than this share is marked, and its row not ranked."""

DIRECT_KNOBS = ("k", "max_iterations")
"""Config fields that are the L0: of the TopK family, and of matching pursuit."""
ON_DEMAND_KNOBS = ("target_l0",)
"""Fields that are the L0 if the rest of the config makes them so: of JumpReLU's quadratic loss."""

GAIN = 0.005
PROPORTIONAL = 0.5


class Knob(NamedTuple):
    """What is turned to reach an L0."""

    name: str
    steered: bool
    """Turned by an `L0Controller` during training; else a config field, set to the L0."""

    def __str__(self) -> str:
        return f"{self.name}, steered" if self.steered else self.name


def direct_knob(config_class: type, asked: str | None = None) -> str | None:
    """The field of a training config that is the L0 itself, if it has one."""
    names = {field.name for field in fields(config_class)}
    if asked in ON_DEMAND_KNOBS and asked in names:
        return asked
    return next((name for name in DIRECT_KNOBS if name in names), None)


def find_knob(cfg: TrainingSAEConfig, asked: str | None = None) -> Knob:
    """What sets the L0 of an architecture: what is asked for, its one coefficient, or a field.

    Raises:
        SettingsError: nothing does, or it is not clear what.
    """
    # Of an input of one dimension and here, as only its coefficients are looked at.
    sae = TrainingSAE[Any].from_dict(replace(cfg, d_in=1, device="cpu").to_dict())
    coefficients = list(sae.get_coefficients())
    direct = direct_knob(type(cfg), asked)
    numbers = [f.name for f in fields(cfg) if type(getattr(cfg, f.name)) is float]
    if asked is not None:
        if asked == direct:
            return Knob(asked, False)
        if asked in coefficients or asked in numbers:
            return Knob(asked, True)
    elif len(coefficients) == 1:
        return Knob(coefficients[0], True)
    elif direct is not None and not coefficients:
        return Knob(direct, False)
    allowed = [*coefficients, *([direct] if direct else []), *numbers]
    problem = f"l0_knob is {asked!r}" if asked else "l0_knob: missing"
    raise SettingsError(
        f"{problem}: what sets the L0 of {cfg.architecture()!r}? Allowed is one of "
        f"{', '.join(allowed)}"
    )


def is_matched(l0: float | None, target: float) -> bool:
    """Whether a measured L0 is within tolerance of the one asked for."""
    return l0 is not None and abs(l0 - target) <= L0_TOLERANCE * target


class L0Controller:
    """Turns what the L0 follows (more of it, fewer active latents) until the L0 is the one asked
    for: a coefficient of the loss, or a number of the SAE's config that is read at every step.

    With ``e_t = log(L0_t / target)``, clipped to [-1, 1], the value after step t is
    ``exp(s_t + p e_t)`` with ``s_t = s_{t-1} + g_t e_t``: a proportional-integral controller of its
    logarithm. ``g_t`` falls with the learning rate, as the SAE then answers more slowly. The value
    starts where the config has it, and waits for the coefficient's own warm-up.
    """

    def __init__(self, trainer: SAETrainer[Any, Any], knob: Knob, target: float) -> None:
        self._trainer = trainer
        self._target = target
        self._scheduler = trainer.coefficient_schedulers.get(knob.name)
        self._name = knob.name
        self._integral = math.log(max(self.value, 1e-8))

    @property
    def value(self) -> float:
        """Where the knob stands."""
        if self._scheduler is not None:
            return float(self._scheduler.final_value)
        return float(getattr(self._trainer.sae.cfg, self._name))

    def _set(self, value: float) -> None:
        if self._scheduler is not None:
            self._scheduler.final_value = self._scheduler.current_value = value
        else:
            setattr(self._trainer.sae.cfg, self._name, value)

    def after_step(self, output: TrainStepOutput) -> None:
        """Look at the L0 of the step just done, and set the knob for the next one."""
        scheduler = self._scheduler
        if scheduler is not None and scheduler.current_step < scheduler.warm_up_steps:
            return
        l0 = mean_l0(output)
        error = max(-1.0, min(1.0, math.log(max(l0, 1e-6) / self._target)))
        rate = self._trainer.optimizer.param_groups[0]["lr"] / self._trainer.cfg.lr
        self._integral += GAIN * rate * error
        self._set(math.exp(self._integral + PROPORTIONAL * error))

    def state_dict(self) -> dict[str, float]:
        return {"integral": self._integral, "value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a state, after the trainer's own was loaded."""
        self._integral = state["integral"]
        self._set(state["value"])
        if self._scheduler is not None:  # which may be in its warm-up
            self._scheduler.load_state_dict({})


def mean_l0(output: TrainStepOutput) -> float:
    """Active latents a sample in a training step."""
    unmasked: Any = output.metrics.get("l0_unmasked")  # of ATM, whose step may see a part
    return float(view.mean_l0(output.feature_acts) if unmasked is None else unmasked())
