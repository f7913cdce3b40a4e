"""Sweeps: comparisons whose entries are the points of a grid, or drawn at random.

A sweep file is a comparison file, or the run file of one SAE, with `sweep` added:

    sweep:
      over:
        lr: [1.0e-3, 3.0e-3]                          # values, of any field of the run
        sae.mask_rate: {low: 0.1, high: 10, log: true}  # or a range to draw from
      points: 20                      # drawn at random; left out, all combinations of the values
      seed: 0                         # more points with the same seed: the same, and more
      objective: absorption_fraction  # the figure that the best points are told by

Every architecture is trained at every point, at matched L0 and with every seed; fields of `sae`
concern those architectures that have them.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from typing_extensions import Self

from sae_lens_atm.compare.plan.comparison_file import (
    OWN_KEYS,
    SAME_FOR_ALL,
    Comparison,
    is_comparison,
    parse_comparison,
    read_comparison,
)
from sae_lens_atm.compare.plan.l0_target import direct_knob
from sae_lens_atm.compare.report.results import Point, Sweep
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.metrics.figures import FIGURES, NEEDS, figure
from sae_lens_atm.training.schema import describe_errors, did_you_mean, shown

Values = dict[str, Any]


class Range(BaseModel):
    """Numbers to draw from, evenly or evenly in their logarithm; whole ones if both ends are."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    low: int | float
    high: int | float
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low}: allowed is less than high, {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}: allowed is more than 0 with log")
        return self

    def draw(self, chance: random.Random) -> int | float:
        low, high = self.low, self.high
        if isinstance(low, int) and isinstance(high, int):
            if self.log:
                return min(int(low * ((high + 1) / low) ** chance.random()), high)
            return chance.randint(low, high)
        if self.log:
            return low * (high / low) ** chance.random()
        return chance.uniform(low, high)


class SweepSettings(BaseModel):
    """`sweep` in a file."""

    model_config = ConfigDict(extra="forbid")
    over: dict[str, Any] = Field(min_length=1)
    points: int | None = Field(default=None, ge=1)
    seed: int = 0
    objective: str = "explained_variance"


def load_sweep(
    path: str | Path, overrides: Iterable[str] = (), quick: bool = False, elsewhere: bool = False
) -> Comparison:
    """Read a sweep file, check everything, and lay out its runs.

    Args:
        elsewhere: the runs are in processes of other folders, so that paths must be whole.

    Raises:
        SettingsError: with one line for each thing that is wrong.
    """
    content = read_comparison(path, overrides, quick)
    sweep, axes = parse_sweep(content)
    base = {key: value for key, value in content.items() if key != "sweep"}
    if not is_comparison(base):
        base = as_comparison(base)
    name = Path(path).stem
    if elsewhere:
        base = _with_whole_paths(base, f"runs/{name}{'-quick' if quick else ''}")
    if not isinstance(base["architectures"], dict):
        raise SettingsError(
            f"architectures is {shown(base['architectures'])}: allowed is a mapping"
        )
    entries: dict[str, Values] = {}
    points: dict[str, Point] = {}
    placed: set[str] = set()
    for kind, entry in cast(dict[str, Any], base["architectures"]).items():
        if not isinstance(entry, dict):
            raise SettingsError(f"architectures.{kind} is {shown(entry)}: allowed is a mapping")
        own = _axes_of(kind, cast(Values, entry), axes)
        placed |= own.keys()
        for values in points_of(own, sweep.points, sweep.seed):
            label = _label(kind, values, own)
            while label in entries:
                label += "'"
            entries[label] = _with(cast(Values, entry), kind, values)
            points[label] = Point(entry=kind, values=values)
    missing = [key for key in axes if key not in placed]
    if missing:
        raise SettingsError(f"sweep.over.{missing[0]}: no architecture here has that field")
    comparison = parse_comparison({**base, "architectures": entries}, name, quick)
    _check_objective(sweep.objective, comparison)
    return replace(
        comparison, content=content, sweep=Sweep(objective=sweep.objective, points=points)
    )


def parse_sweep(content: Values) -> tuple[SweepSettings, dict[str, list[Any] | Range]]:
    """What a file says of its sweep, and what each swept field may be."""
    given = content.get("sweep")
    if not isinstance(given, dict):
        raise SettingsError("sweep: missing, a mapping with `over`: what to vary")
    try:
        sweep = SweepSettings.model_validate(given)
    except ValidationError as error:
        lines = describe_errors(error, cast(Values, given), SweepSettings)
        raise SettingsError("\n".join(f"sweep.{line}" for line in lines)) from error
    if figure(sweep.objective).better == 0:
        allowed = [name for name, shown_as in FIGURES.items() if shown_as.better]
        raise SettingsError(
            f"sweep.objective is {sweep.objective!r}: allowed is one of {', '.join(allowed)}"
            + did_you_mean(sweep.objective, allowed)
        )
    axes = dict(_axes(sweep.over, ""))
    drawn = [key for key, axis in axes.items() if isinstance(axis, Range)]
    if drawn and sweep.points is None:
        raise SettingsError(f"sweep.points: missing, and sweep.over.{drawn[0]} is to be drawn")
    return sweep, axes


def _with_whole_paths(base: Values, output: str) -> Values:
    local = ("dataset_path", "model_name", "synthetic_model")
    paths = {key: str(base.get(key)) for key in local if Path(str(base.get(key))).exists()}
    paths["output_path"] = str(base.get("output_path", output))
    return base | {key: str(Path(path).expanduser().absolute()) for key, path in paths.items()}


def _check_objective(name: str, comparison: Comparison) -> None:
    """Check that the runs will have the figure.

    Raises:
        SettingsError: naming those that they will have.
    """
    first = comparison.planned[0]
    has: dict[str, bool] = {
        "synthetic": comparison.is_synthetic,
        "model": not comparison.is_synthetic,
        "letters": first.first_letters is not None,
        "parents": comparison.is_synthetic or first.first_letters is not None,
        "seeds": len({planned.seed for planned in comparison.planned}) > 1,
    }
    allowed = [
        known
        for known, shown_as in FIGURES.items()
        if shown_as.better and has.get(NEEDS.get(known, ""), True)
        if known not in comparison.not_ranked
    ]
    if name not in allowed:
        raise SettingsError(
            f"sweep.objective is {name!r}: allowed is what these runs will have, one of "
            f"{', '.join(allowed)}"
        )


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
                where = ".".join(["sweep.over", key, *map(str, first["loc"][:1])])
                reason = first["msg"].removeprefix("Value error, ")
                raise SettingsError(f"{where}: {reason[0].lower()}{reason[1:]}") from error
        elif isinstance(value, dict) and name == "sae" and not prefix:
            yield from _axes(cast(Values, value), "sae.")
        else:
            raise SettingsError(
                f"sweep.over.{key} is {shown(value)}: allowed is a list of values, or low and high"
            )


def _number(value: Any) -> Any:
    """YAML takes 1e-3, without a dot, for text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def as_comparison(content: Values) -> Values:
    """A run file as a comparison of one entry: at its L0, with its seed."""
    sae = content.get("sae")
    architecture = cast(Values, sae).get("architecture") if isinstance(sae, dict) else None
    known = architecture if isinstance(architecture, str) else ""
    registered = SAE_TRAINING_CLASS_REGISTRY.get(known)
    if registered is None:
        raise SettingsError(
            f"sae.architecture is {shown(architecture)}: allowed is one of "
            f"{', '.join(sorted(SAE_TRAINING_CLASS_REGISTRY))}"
        )
    result = {key: value for key, value in content.items() if key != "seed"}
    result["sae"] = {k: v for k, v in cast(Values, sae).items() if k != "architecture"}
    result.setdefault("seeds", [content.get("seed", 0)])
    knob = direct_knob(registered[1])
    if "l0" not in result and knob is not None:
        default = next(f.default for f in fields(registered[1]) if f.name == knob)
        result["l0"] = [result["sae"].pop(knob, default)]
    result["architectures"] = {str(architecture): {"role": "candidate"}}
    return result


def points_of(
    axes: dict[str, list[Any] | Range], count: int | None, seed: int
) -> list[dict[str, Any]]:
    """All combinations, or as many as asked for, drawn at random; none of them twice."""
    if count is None:
        combinations = product(*(cast(list[Any], axis) for axis in axes.values()))
        found = [dict(zip(axes, values, strict=True)) for values in combinations]
    else:
        found = [_drawn(axes, f"{seed} {i}") for i in range(count)]
    return [point for i, point in enumerate(found) if point not in found[:i]]


def _drawn(axes: dict[str, list[Any] | Range], seed: str) -> dict[str, Any]:
    # Each value by a seed of its own: another axis more leaves the others as they are.
    return {
        key: axis.draw(chance) if isinstance(axis, Range) else chance.choice(axis)
        for key, axis in axes.items()
        for chance in [random.Random(f"{seed} {key}")]
    }


def _axes_of(
    name: str, entry: Values, axes: dict[str, list[Any] | Range]
) -> dict[str, list[Any] | Range]:
    """Those of the swept fields that concern an architecture."""
    registered = SAE_TRAINING_CLASS_REGISTRY.get(str(entry.get("architecture") or name))
    if registered is None:  # told when the entries are checked
        return axes
    knob = direct_knob(registered[1], entry.get("l0_knob"))
    names = {f.name for f in fields(registered[1])}
    own: dict[str, list[Any] | Range] = {}
    for key, axis in axes.items():
        first, _, field = key.partition(".")
        if key in SAME_FOR_ALL or key in OWN_KEYS:
            raise SettingsError(f"sweep.over.{key}: the same for all points")
        if first == "sae" and field == knob:
            raise SettingsError(f"sweep.over.{key}: that is the L0, which `l0` has a list of")
        if first != "sae" or field in names:
            own[key] = axis
    return own


def _with(entry: Values, name: str, values: dict[str, Any]) -> Values:
    """An entry at a point."""
    sae = {k.removeprefix("sae."): v for k, v in values.items() if k.startswith("sae.")}
    run = {k: v for k, v in values.items() if not k.startswith("sae.")}
    return {
        "architecture": name,
        **entry,
        "sae": {**(entry.get("sae") or {}), **sae},
        "run": {**(entry.get("run") or {}), **run},
    }


def _label(name: str, values: dict[str, Any], axes: dict[str, Any]) -> str:
    parts = [name]
    for key, value in values.items():
        short = key.rpartition(".")[2]
        # Drawn numbers differ in their first digits; listed ones are told in full.
        listed = not isinstance(axes[key], Range) or isinstance(value, int)
        parts.append(f"{short} {value}" if listed else f"{short} {value:.3g}")
    return ", ".join(parts)
