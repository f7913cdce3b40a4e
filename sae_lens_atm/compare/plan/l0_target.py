"""The L0 of every SAE in a comparison.

Some architectures have a config field that is the L0. For the others an `L0Controller` adjusts a
coefficient during training until the L0 is the target. A few find their L0 themselves.
"""

from dataclasses import fields, replace
from typing import Any, NamedTuple

from sae_lens import TrainingSAE, TrainingSAEConfig

from sae_lens_atm.errors import SettingsError

L0_TOLERANCE = 0.05
"""Relative distance to the target L0 beyond which a run is marked and its row not ranked."""

DIRECT_FIELDS = ("k", "max_iterations")
"""Config fields that are the L0: of the TopK family, and of matching pursuit."""
CONDITIONAL_FIELDS = ("target_l0",)
"""Config fields that are the L0 only with some other settings: of JumpReLU's quadratic loss."""
FINDS_L0 = "finds_l0"
"""Class attribute of configs of architectures whose L0 follows from the data."""
ANY_L0 = 2
"""An L0 that every architecture allows, where it has no effect."""
SMALLEST_K = "smallest_k"
"""Class attribute of configs of architectures that do not allow a k of 1."""


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


def is_whole_number(config_class: type, field: str | None) -> bool:
    """Return whether a field of a training config is a whole number."""
    return any(f.name == field and f.type in (int, "int") for f in fields(config_class))


def find_l0_parameter(cfg: TrainingSAEConfig, requested: str | None = None) -> L0Parameter:
    """Return the parameter that sets the L0 of an architecture.

    It is the requested parameter. Without a request it is the only coefficient of the loss. A loss
    without coefficients leaves the config field that is the L0. Nothing sets the L0 of an
    architecture that finds it itself.

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
    elif getattr(cfg, FINDS_L0, False):
        return L0Parameter("found by the method", False)
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
