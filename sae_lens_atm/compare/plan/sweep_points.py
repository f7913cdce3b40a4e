"""`sweep` in a file: the swept fields, their values, and the points that are trained."""

import random
from collections.abc import Iterator
from itertools import product
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from sae_lens_atm.errors import SettingsError, shown
from sae_lens_atm.metrics.figures import FIGURES, figure
from sae_lens_atm.training.schema import describe_errors, did_you_mean

Values = dict[str, Any]


class Range(BaseModel):
    """An interval of numbers to draw from, uniformly or uniformly in the logarithm.

    If both ends are integers, so are the draws.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low must be less than high, {self.high}, got {self.low}")
        if self.log and self.low <= 0:
            raise ValueError(f"low must be more than 0 with log, got {self.low}")
        return self

    def draw(self, generator: random.Random) -> int | float:
        """Draw one number."""
        low, high = self.low, self.high
        if isinstance(low, int) and isinstance(high, int):
            if self.log:
                return min(int(low * ((high + 1) / low) ** generator.random()), high)
            return generator.randint(low, high)
        if self.log:
            return low * (high / low) ** generator.random()
        return generator.uniform(low, high)


Axes = dict[str, list[Any] | Range]
"""The values of each swept field, by its dotted name."""


class SweepSettings(BaseModel):
    """The value of `sweep` in a file."""

    model_config = ConfigDict(extra="forbid")
    over: dict[str, Any] = Field(min_length=1)
    points: int | None = Field(default=None, ge=1)
    seed: int = 0
    objective: str = "explained_variance"


def parse_sweep(content: Values) -> tuple[SweepSettings, Axes]:
    """Check `sweep` in the content of a file, and return it with the swept fields.

    Raises:
        SettingsError: with one line for each mistake.
    """
    given = content.get("sweep")
    if not isinstance(given, dict):
        raise SettingsError("sweep: missing, add a mapping with `over`, the fields to vary")
    try:
        sweep = SweepSettings.model_validate(given)
    except ValidationError as error:
        lines = describe_errors(error, cast(Values, given), SweepSettings)
        raise SettingsError("\n".join(f"sweep.{line}" for line in lines)) from error
    if figure(sweep.objective).better == 0:
        allowed = [name for name, shown_as in FIGURES.items() if shown_as.better]
        raise SettingsError(
            f"sweep.objective must be one of {', '.join(allowed)}, got {sweep.objective!r}"
            + did_you_mean(sweep.objective, allowed)
        )
    axes = dict(_axes(sweep.over, ""))
    ranges = [key for key, axis in axes.items() if isinstance(axis, Range)]
    if ranges and sweep.points is None:
        raise SettingsError(
            f"sweep.points: missing, set the number of points, as sweep.over.{ranges[0]} is a range"
        )
    return sweep, axes


def _axes(over: Values, prefix: str) -> Iterator[tuple[str, list[Any] | Range]]:
    for name, value in over.items():
        key = f"{prefix}{name}"
        if isinstance(value, list) and value:
            yield key, [_number(v) for v in cast(list[Any], value)]
        elif isinstance(value, dict) and value.keys() & {"low", "high", "log"}:
            try:
                yield key, Range.model_validate(value)
            except ValidationError as error:
                first = error.errors()[0]
                location = ".".join(["sweep.over", key, *map(str, first["loc"][:1])])
                reason = first["msg"].removeprefix("Value error, ")
                raise SettingsError(f"{location}: {reason[0].lower()}{reason[1:]}") from error
        elif isinstance(value, dict) and name == "sae" and not prefix:
            yield from _axes(cast(Values, value), "sae.")
        else:
            raise SettingsError(
                f"sweep.over.{key} must be a list of values, or low and high, got {shown(value)}"
            )


def _number(value: Any) -> Any:
    """Return a number for text such as 1e-3, which YAML reads as text for want of a dot."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def sweep_points(axes: Axes, count: int | None, seed: int) -> list[Values]:
    """Return the points of a sweep, without duplicates.

    Args:
        axes: the values of each swept field.
        count: number of points to draw at random. None: all combinations of the values.
        seed: seed of the draws. A larger `count` adds points and keeps the others.
    """
    if count is None:
        combinations = product(*(cast(list[Any], axis) for axis in axes.values()))
        points = [dict(zip(axes, values, strict=True)) for values in combinations]
    else:
        points = [_draw_point(axes, f"{seed} {i}") for i in range(count)]
    return [point for i, point in enumerate(points) if point not in points[:i]]


def _draw_point(axes: Axes, seed: str) -> Values:
    # Each field has a seed of its own: a further field leaves the draws of the others unchanged.
    return {
        key: axis.draw(generator) if isinstance(axis, Range) else generator.choice(axis)
        for key, axis in axes.items()
        for generator in [random.Random(f"{seed} {key}")]
    }
