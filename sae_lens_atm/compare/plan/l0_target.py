"""The L0 of every SAE in a comparison.

Some architectures have a config field that is the L0. For the others an `L0Controller` adjusts a
coefficient during training until the L0 is the target.
"""

import math
from dataclasses import fields, replace
from typing import Any, NamedTuple

from sae_lens import SAETrainer, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.sae import TrainStepOutput

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.sae import forward_pass as view

L0_TOLERANCE = 0.05
"""Relative distance to the target L0 beyond which a run is marked and its row not ranked."""

DIRECT_FIELDS = ("k", "max_iterations")
"""Config fields that are the L0: of the TopK family, and of matching pursuit."""
CONDITIONAL_FIELDS = ("target_l0",)
"""Config fields that are the L0 only with some other settings: of JumpReLU's quadratic loss."""

GAIN = 0.005
PROPORTIONAL = 0.5


class L0Parameter(NamedTuple):
    """The parameter that sets the L0 of an architecture."""

    name: str
    controlled: bool
    """Whether an `L0Controller` changes it during training. If not, it is a config field that holds
    the target L0."""

    def __str__(self) -> str:
        return f"{self.name}, controlled" if self.controlled else self.name


def direct_l0_field(config_class: type, requested: str | None = None) -> str | None:
    """Return the field of a training config that is the L0, or None if there is none.

    Args:
        config_class: dataclass of a training config.
        requested: `l0_parameter` in the comparison file.
    """
    names = {field.name for field in fields(config_class)}
    if requested in CONDITIONAL_FIELDS and requested in names:
        return requested
    return next((name for name in DIRECT_FIELDS if name in names), None)


def find_l0_parameter(cfg: TrainingSAEConfig, requested: str | None = None) -> L0Parameter:
    """Return the parameter that sets the L0 of an architecture.

    It is the requested parameter. Without a request it is the only coefficient of the loss. A loss
    without coefficients leaves the config field that is the L0.

    Args:
        cfg: training config of the SAE.
        requested: `l0_parameter` in the comparison file.

    Raises:
        SettingsError: the requested name does not exist, or the choice is ambiguous.
    """
    # Only the coefficients are needed: d_in 1 on the CPU makes this SAE cheap.
    sae = TrainingSAE[Any].from_dict(replace(cfg, d_in=1, device="cpu").to_dict())
    coefficients = list(sae.get_coefficients())
    direct = direct_l0_field(type(cfg), requested)
    numbers = [f.name for f in fields(cfg) if type(getattr(cfg, f.name)) is float]
    if requested is not None:
        if requested == direct:
            return L0Parameter(requested, False)
        if requested in coefficients or requested in numbers:
            return L0Parameter(requested, True)
    elif len(coefficients) == 1:
        return L0Parameter(coefficients[0], True)
    elif direct is not None and not coefficients:
        return L0Parameter(direct, False)
    allowed = [*coefficients, *([direct] if direct else []), *numbers]
    problem = f"l0_parameter is {requested!r}" if requested else "l0_parameter: missing"
    raise SettingsError(
        f"{problem}: allowed for {cfg.architecture()!r} is one of {', '.join(allowed)}"
    )


def is_matched(l0: float | None, target: float) -> bool:
    """Return whether a measured L0 is within `L0_TOLERANCE` of the target."""
    return l0 is not None and abs(l0 - target) <= L0_TOLERANCE * target


class L0Controller:
    """Turns what the L0 follows (more of it, fewer active latents) until the L0 is the one asked
    for: a coefficient of the loss, or a number of the SAE's config that is read at every step.

    With ``e_t = log(L0_t / target)``, clipped to [-1, 1], the value after step t is
    ``exp(s_t + p e_t)`` with ``s_t = s_{t-1} + g_t e_t``: a proportional-integral controller of its
    logarithm. ``g_t`` falls with the learning rate, as the SAE then answers more slowly. The value
    starts where the config has it, and waits for the coefficient's own warm-up.
    """

    def __init__(self, trainer: SAETrainer[Any, Any], knob: L0Parameter, target: float) -> None:
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
