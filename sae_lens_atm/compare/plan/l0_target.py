"""Every SAE of a comparison at the same L0: set where there is a setting for it, steered to where
there is only something that the L0 follows."""

from dataclasses import fields, replace
from typing import Any, NamedTuple

from sae_lens import TrainingSAE, TrainingSAEConfig

from sae_lens_atm.errors import SettingsError

L0_TOLERANCE = 0.05
"""A run further off its target than this share is marked, and its row not ranked."""

DIRECT_KNOBS = ("k", "max_iterations")
"""Config fields that are the L0: of the TopK family, and of matching pursuit."""
ON_DEMAND_KNOBS = ("target_l0",)
"""Fields that are the L0 if the rest of the config makes them so: of JumpReLU's quadratic loss."""


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
