"""Pictures of a comparison as PNG files, for documents."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from sae_lens_atm.compare.report.charts import PARETO, bar, importance_runs
from sae_lens_atm.compare.report.results import Importance, Results, Row, Sweep
from sae_lens_atm.compare.report.styles import (
    GROUP_COLOURS,
    PALETTE,
    Style,
    axis_range,
    entry_styles,
    is_logarithmic,
)
from sae_lens_atm.compare.report.sweep import has_numbers, swept_fields
from sae_lens_atm.compare.report.wording import count_latents, show_l0
from sae_lens_atm.metrics.figures import figure

_DASHES = {
    "solid": "-",
    "dash": "--",
    "dot": ":",
    "dashdot": "-.",
    "longdash": (0, (8, 3)),
}
"""Matplotlib's dashes for plotly's names."""


def draw_pictures(results: Results, folder: Path) -> list[Path]:
    """Draw figures against L0, importance over training, and the points of a sweep.

    A picture is left out if the results do not hold its data. Returns the paths.
    """
    drawn: list[Path] = []
    if len({row.l0_target for row in results.rows}) > 1:
        drawn.append(_draw_pareto(results, folder / "pareto.png"))
    if any(run.importance is not None for run in results.runs):
        drawn.append(_draw_dynamics(results, folder / "importance.png"))
    if results.sweep is not None and results.rows:
        drawn.append(_draw_sweep(results, results.sweep, folder / "sweep.png"))
    return drawn


def _plain(name: str) -> str:
    """Return a name as matplotlib shows it literally: a dollar sign starts a formula."""
    return name.replace("$", r"\$")


def _figure(lines: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure and its grid of axes, without pyplot, whose backend belongs to the caller."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=size, layout="constrained")
    return picture, picture.subplots(lines, columns, squeeze=False)


def _draw_pareto(results: Results, path: Path) -> Path:
    present = {name for row in results.rows for name in row.figures}
    names = [name for name in PARETO if name in present]
    columns = 2
    lines = -(-len(names) // columns)
    picture, grid = _figure(lines, columns, (11, 4.2 * lines))
    styles = entry_styles(results.entries)
    for axes, name in zip(grid.flat, names, strict=False):
        for entry in results.entries:
            rows = [row for row in results.rows if row.entry == entry]
            _draw_entry(axes, rows, name, styles[entry])
        axes.set_ylim(*_range(results, name))
        arrow = {1: "higher is better", -1: "lower is better", 0: ""}[figure(name).better]
        axes.set(xlabel="measured L0", title=f"{figure(name).label} ({arrow})")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    picture.savefig(path, dpi=120)
    return path


def _range(results: Results, name: str) -> list[float]:
    """Return the range of a figure's axis. It leaves out controls far from the other rows."""
    reach: dict[bool, list[list[float]]] = {True: [], False: []}
    for row in results.rows:
        value = row.figures.get(name)
        if value is not None and value.mean is not None:
            down, up = bar(row, name)
            is_control = results.entries[row.entry].role == "control"
            reach[is_control].append([value.mean - down, value.mean + up])
    near = reach[False] or reach[True]
    return axis_range([end for ends in near for end in ends], reach[True])


def _line(style: Style) -> dict[str, Any]:
    return {
        "color": style.colour,
        "linestyle": _DASHES[style.dash],
        "linewidth": 0.85 * style.width,
    }


def _draw_entry(axes: Any, rows: Sequence[Row], name: str, style: Style) -> None:
    rows = [row for row in rows if name in row.figures and row.figures[name].mean is not None]
    if not rows:
        return
    rows.sort(key=lambda row: row.figures["l0"].mean or 0.0)
    x = [row.figures["l0"].mean for row in rows]
    y = [row.figures[name].mean for row in rows]
    ends = [*zip(*(bar(row, name) for row in rows), strict=True)]
    axes.errorbar(x, y, ends, **_line(style), capsize=2, label=_plain(rows[0].entry))
    for row, x_at, y_at in zip(rows, x, y, strict=True):
        filled = style.colour if row.matched else "white"
        axes.plot(x_at, y_at, "o", color=style.colour, markerfacecolor=filled, markersize=5)


def _draw_dynamics(results: Results, path: Path) -> Path:
    run, importance = importance_runs(results)[0]
    picture, ((left, right),) = _figure(1, 2, (12, 4.4))
    _draw_importance(left, importance)
    styles = entry_styles(results.entries)
    same_seed = [r for r in results.runs if (r.seed, r.l0_target) == (run.seed, run.l0_target)]
    name = "absorption_fraction"
    if not any(r.curve and r.curve.absorption_fraction for r in same_seed):
        name = "explained_variance"
    for other in same_seed:
        if other.curve is not None and getattr(other.curve, name):
            right.plot(
                other.curve.steps,
                getattr(other.curve, name),
                **_line(styles[other.entry]),
                label=_plain(other.entry),
            )
    if not right.lines:
        right.text(0.5, 0.5, "no curves stored", ha="center", transform=right.transAxes)
    right.set(xlabel="training step", ylabel=figure(name).label, ylim=(0, None))
    lower = " (lower is better)" if figure(name).better < 0 else ""
    label = figure(name).label
    right.set_title(
        f"{label[0].upper()}{label[1:]}{lower}, L0 {show_l0(run.l0_target)}, seed {run.seed}"
    )
    if right.lines:
        right.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(path, dpi=130)
    return path


def _draw_importance(axes: Any, importance: Importance) -> None:
    for (name, quartiles), colour in zip(importance.groups.items(), GROUP_COLOURS, strict=False):
        low, middle, high = zip(*quartiles, strict=True)
        label = f"{name} ({count_latents(importance.latents[name])})"
        axes.plot(importance.steps, middle, color=colour, label=label)
        axes.fill_between(importance.steps, low, high, color=colour, alpha=0.2, linewidth=0)
    threshold = r"threshold $\theta_t$"
    axes.plot(importance.steps, importance.threshold, "--", color="#444", label=threshold)
    axes.set(xlabel="training step", ylabel="importance (median, quartiles)", yscale="log")
    top = axes.get_ylim()[1]
    axes.set_ylim(0.01, max(top, 10) * 6)  # room for the legend
    axes.set_title("Latents below the threshold are masked at random")
    axes.legend(frameon=False, loc="upper center", ncols=2, fontsize="small")


def _draw_sweep(results: Results, sweep: Sweep, path: Path) -> Path:
    """Draw the objective against each swept field."""
    keys = swept_fields(sweep)
    levels = list(dict.fromkeys(row.l0_target for row in results.rows))
    kinds = list(dict.fromkeys(point.entry for point in sweep.points.values()))
    picture, grid = _figure(len(levels), len(keys), (4.2 * len(keys), 3.6 * len(levels)))
    for line, l0 in zip(grid, levels, strict=True):
        for axes, key in zip(line, keys, strict=True):
            text = not has_numbers(sweep, key)
            if not text:
                values = [p.values[key] for p in sweep.points.values() if key in p.values]
                _set_scale(axes, values)
            for kind, colour in zip(kinds, cycle(PALETTE)):
                _draw_points(axes, results, sweep, (l0, key, kind, text), colour)
            axes.set(xlabel=key, title=f"L0 {show_l0(l0)}")
            axes.spines[["top", "right"]].set_visible(False)
        shown = figure(sweep.objective)
        arrow = {1: "higher is better", -1: "lower is better"}[shown.better]
        line[0].set_ylabel(f"{shown.label} ({arrow})")
    if len(kinds) > 1:
        handles, labels = grid.flat[0].get_legend_handles_labels()
        picture.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    picture.savefig(path, dpi=120)
    return path


def _set_scale(axes: Any, values: list[float]) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    if is_logarithmic(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.locator_params(axis="x", nbins=5)


def _draw_points(
    axes: Any, results: Results, sweep: Sweep, of: tuple[float, str, str, bool], colour: str
) -> None:
    l0, key, kind, text = of
    for row in results.rows:
        point, value = sweep.points[row.entry], row.figures.get(sweep.objective)
        if row.l0_target != l0 or point.entry != kind or key not in point.values:
            continue
        if value is None or value.mean is None:
            continue
        x = _plain(str(point.values[key])) if text else point.values[key]
        filled = colour if row.matched else "white"
        ends = [[length] for length in bar(row, sweep.objective)]
        axes.errorbar(x, value.mean, ends, color=colour, capsize=2, fmt="none")
        axes.plot(x, value.mean, "o", color=colour, markerfacecolor=filled, markersize=5)
    axes.plot([], [], "o", color=colour, label=_plain(kind))
