"""Sweep files: a comparison whose entries are points of a grid, or points drawn at random.

A sweep file is a comparison file, or the run file of one SAE, with `sweep` added:

    sweep:
      over:
        lr: [1.0e-3, 3.0e-3]                          # a list of values of a field of the run
        sae.mask_rate: {low: 0.1, high: 10, log: true}  # or a range to draw from
      points: 20                      # number of random points; without it, all combinations
      seed: 0                         # with the same seed, more points include the earlier ones
      objective: absorption_fraction  # the figure by which points are ranked

Every architecture is trained at every point, at the same L0s and with the same seeds. A field of
`sae` is swept only for the architectures that have it.
"""

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from sae_lens_atm.baselines import training_class, training_names
from sae_lens_atm.compare.plan.comparison_file import (
    Comparison,
    is_comparison,
    parse_comparison,
    read_comparison,
)
from sae_lens_atm.compare.plan.comparison_settings import OWN_KEYS, SAME_FOR_ALL
from sae_lens_atm.compare.plan.l0_target import direct_l0_field
from sae_lens_atm.compare.plan.sweep_points import Axes, Range, Values, parse_sweep, sweep_points
from sae_lens_atm.compare.report.results import Point, Sweep
from sae_lens_atm.errors import SettingsError, shown
from sae_lens_atm.metrics.figures import FIGURES, NEEDS


def load_sweep(
    path: str | Path,
    overrides: Iterable[str] = (),
    quick: bool = False,
    absolute_paths: bool = False,
) -> Comparison:
    """Read and check a sweep file, and plan its runs.

    Args:
        path: the YAML file.
        overrides: `key.subkey=value` pairs.
        quick: apply the changes under `quick`.
        absolute_paths: make local paths absolute, for processes in other working directories.

    Raises:
        SettingsError: the file is wrong. The message has one line for each mistake.
    """
    content = read_comparison(path, overrides, quick)
    sweep, axes = parse_sweep(content)
    base = {key: value for key, value in content.items() if key != "sweep"}
    if not is_comparison(base):
        base = as_comparison(base)
    name = Path(path).stem
    if absolute_paths:
        base = _with_absolute_paths(base, f"runs/{name}{'-quick' if quick else ''}")
    if not isinstance(base["architectures"], dict):
        raise SettingsError(f"architectures must be a mapping, got {shown(base['architectures'])}")
    entries: dict[str, Values] = {}
    points: dict[str, Point] = {}
    used: set[str] = set()
    for architecture, entry in cast(dict[str, Any], base["architectures"]).items():
        if not isinstance(entry, dict):
            raise SettingsError(
                f"architectures.{architecture} must be a mapping, got {shown(entry)}"
            )
        own_axes = _axes_of(architecture, cast(Values, entry), axes)
        used |= own_axes.keys()
        for values in sweep_points(own_axes, sweep.points, sweep.seed):
            label = _label(architecture, values, own_axes)
            while label in entries:
                label += "'"
            entries[label] = _entry_at(cast(Values, entry), architecture, values)
            points[label] = Point(entry=architecture, values=values)
    missing = [key for key in axes if key not in used]
    if missing:
        raise SettingsError(f"sweep.over.{missing[0]}: no architecture of this file has the field")
    if isinstance(base.get("l0"), str):
        raise SettingsError("l0: a sweep takes a list of L0s, `found` is for comparisons")
    comparison = parse_comparison({**base, "architectures": entries}, name, quick)
    _check_objective(sweep.objective, comparison)
    return replace(
        comparison, content=content, sweep=Sweep(objective=sweep.objective, points=points)
    )


def _with_absolute_paths(base: Values, output: str) -> Values:
    local = ("dataset_path", "model_name", "synthetic_model")
    paths = {key: str(base.get(key)) for key in local if Path(str(base.get(key))).exists()}
    stories: Any = base.get("contrastive_stories")
    if isinstance(stories, dict) and Path(str(cast(Values, stories).get("dataset"))).exists():
        dataset = str(Path(stories["dataset"]).absolute())
        base = base | {"contrastive_stories": {**stories, "dataset": dataset}}
    paths["output_path"] = str(base.get("output_path", output))
    return base | {key: str(Path(path).expanduser().absolute()) for key, path in paths.items()}


def _check_objective(name: str, comparison: Comparison) -> None:
    """Check that the runs will have the figure.

    Raises:
        SettingsError: they will not. The message names the figures that they will have.
    """
    first = comparison.planned[0]
    available: dict[str, bool] = {
        "synthetic": comparison.is_synthetic,
        "model": not comparison.is_synthetic,
        "letters": first.first_letters is not None,
        "parents": comparison.is_synthetic or first.first_letters is not None,
        "tasks": first.sae_probes is not None,
        "stories": first.contrastive_stories is not None,
        "seeds": len({planned.seed for planned in comparison.planned}) > 1,
    }
    allowed = [
        figure
        for figure, shown_as in FIGURES.items()
        if shown_as.better and available.get(NEEDS.get(figure, ""), True)
        if figure not in comparison.not_ranked
    ]
    if name not in allowed:
        raise SettingsError(
            f"sweep.objective must be a figure of these runs, one of {', '.join(allowed)}, got "
            f"{name!r}"
        )


def as_comparison(content: Values) -> Values:
    """Return the content of a run file as a comparison of one entry, at its L0 and seed."""
    sae = content.get("sae")
    architecture = cast(Values, sae).get("architecture") if isinstance(sae, dict) else None
    name = architecture if isinstance(architecture, str) else ""
    registered = training_class(name)
    if registered is None:
        raise SettingsError(
            f"sae.architecture must be one of {', '.join(training_names())}, "
            f"got {shown(architecture)}"
        )
    result = {key: value for key, value in content.items() if key != "seed"}
    result["sae"] = {k: v for k, v in cast(Values, sae).items() if k != "architecture"}
    result.setdefault("seeds", [content.get("seed", 0)])
    l0_field = direct_l0_field(registered[1])
    if "l0" not in result and l0_field is not None:
        default = next(f.default for f in fields(registered[1]) if f.name == l0_field)
        result["l0"] = [result["sae"].pop(l0_field, default)]
    result["architectures"] = {name: {"role": "candidate"}}
    return result


def _axes_of(name: str, entry: Values, axes: Axes) -> Axes:
    """Return the swept fields that an architecture has."""
    registered = training_class(str(entry.get("architecture") or name))
    if registered is None:  # `parse_comparison` reports it
        return axes
    l0_field = direct_l0_field(registered[1], entry.get("l0_parameter"))
    names = {f.name for f in fields(registered[1])}
    own: Axes = {}
    for key, axis in axes.items():
        first, _, field = key.partition(".")
        if key in SAME_FOR_ALL or key in OWN_KEYS:
            raise SettingsError(f"sweep.over.{key} cannot differ between points")
        if first == "sae" and field == l0_field:
            raise SettingsError(f"sweep.over.{key} is the L0: list its values under `l0`")
        if first != "sae" or field in names:
            own[key] = axis
    return own


def _entry_at(entry: Values, architecture: str, values: Values) -> Values:
    """Return an entry with the values of a point."""
    sae = {k.removeprefix("sae."): v for k, v in values.items() if k.startswith("sae.")}
    run = {k: v for k, v in values.items() if not k.startswith("sae.")}
    return {
        "architecture": architecture,
        **entry,
        "sae": {**(entry.get("sae") or {}), **sae},
        "run": {**(entry.get("run") or {}), **run},
    }


def _label(architecture: str, values: Values, axes: Axes) -> str:
    """Return the name of an entry: its architecture and the values of its point."""
    parts = [architecture]
    for key, value in values.items():
        short = key.rpartition(".")[2]
        # Drawn numbers are shortened to three digits; listed values are not.
        exact = not isinstance(axes[key], Range) or isinstance(value, int)
        parts.append(f"{short} {value}" if exact else f"{short} {value:.3g}")
    return ", ".join(parts)
