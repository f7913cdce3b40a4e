"""Configuration fields of version 0.1 that were removed, and what replaces them."""

from typing import Any, NamedTuple


class Removed(NamedTuple):
    """A removed field."""

    remaining: Any
    """The value whose behaviour remains. A field with this value is ignored."""
    advice: str


_ONE_PATH = "each step trains the full SAE and, while masks are active, also the masked SAE"
_PAPER = "masked_weight: 1 trains the masked SAE alone, as in the paper"

REMOVED: dict[str, Removed] = {
    "schedule": Removed("dual", f"{_ONE_PATH}; {_PAPER}"),
    "masked_probability": Removed(0.5, f"{_ONE_PATH}; a smaller mask_end costs less time"),
    "mask_granularity": Removed("step", "each step has one mask for the whole batch"),
    "mask_draw": Removed("independent", "each latent is masked independently of the others"),
    "masked_choice": Removed("again", "the masked pass chooses its k among the kept latents"),
    "k_start": Removed(1.0, "k is constant"),
    "importance_combine": Removed("sum", "importance is the weighted mean of the signals"),
    "c_course": Removed("ramp", "c goes linearly from c_start to c_end until mask_end"),
    "mask_ramp_steps": Removed(0, "use mask_warm_up_steps"),
}
_JUMPRELU = Removed(None, "use 'batchtopk', which is saved as a JumpReLU SAE")


def drop_removed(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Return a copy of a configuration without the removed fields.

    Args:
        values: fields of an ATM configuration, of any version.
        where: prefix of the field's name in the message, for example ``"sae."``.

    Raises:
        ValueError: a removed field has another value than the one whose behaviour remains.
    """
    for name, removed in REMOVED.items():
        if name in values and values[name] != removed.remaining:
            raise ValueError(_message(where, name, values[name], removed))
    if values.get("activation") == "jumprelu":
        raise ValueError(_message(where, "activation", "jumprelu", _JUMPRELU))
    return {name: value for name, value in values.items() if name not in REMOVED}


def _message(where: str, name: str, value: object, removed: Removed) -> str:
    return f"{where}{name} is {value!r}: removed in 0.2, {removed.advice}"
