"""The charts of the HTML report, as plotly figures without colours of the page's theme."""

import math
from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import Any, NamedTuple

import plotly.graph_objects as go
from markupsafe import escape

from sae_lens_atm.compare.report.results import Importance, Results, Row, Run
from sae_lens_atm.compare.report.styles import GREY, GROUP_COLOURS, axis_range, entry_styles
from sae_lens_atm.compare.report.wording import (
    clean,
    heading,
    in_order,
    marks,
    mean,
    show,
    show_interval,
    show_l0,
    show_spread,
    training_window,
)
from sae_lens_atm.metrics.figures import figure

PARETO = ("absorption_fraction", "explained_variance", "mcc", "f1", "ce_loss_score", "kl_div_score")
CURVES = (
    *("explained_variance", "absorption_fraction", "dead_latents", "l0", "decoder_cosine"),
    "saved_bits",
)

_L0_IN_TRAINING = (
    "Number of latents that fire on a sample of the training batch, averaged over samples."
)


class Panel(NamedTuple):
    """A place on the page, with one chart for each L0 to choose from.

    A panel without a choice has a single chart, under the key "".
    """

    key: str
    title: str
    charts: dict[str, go.Figure]
    outside: Sequence[str] = ()
    """Entries that are outside of the axes' ranges."""
    meaning: str = ""
    """The definition of the figure, as a tooltip."""


def blank(x_title: str) -> go.Figure:
    """Return an empty chart. It has no plotly template, so that the page's theme applies."""
    chart = go.Figure(layout={"template": go.layout.Template(), "height": 300})
    return chart.update_layout(xaxis={"title": {"text": x_title}, "nticks": 7}, yaxis_nticks=7)


def add_line(chart: go.Figure, name: str, x: list[int], y: list[float | None], **more: Any) -> None:
    """Add a curve over training steps."""
    hover = "%{fullData.name}<br>step %{x:,}: %{y:.4g}<extra></extra>"
    name = str(escape(name))  # plotly interprets HTML in names
    chart.add_scatter(x=x, y=y, name=name, mode="lines", hovertemplate=hover, **more)


def center(row: Row, name: str) -> float:
    """Return the mean of a figure, or NaN if the row does not have it."""
    value = clean(row.figures[name].mean) if name in row.figures else None
    return math.nan if value is None else value


def bar(row: Row, name: str) -> tuple[float, float]:
    """Return the lengths of an error bar, down and up.

    They are the standard deviation over seeds. For a single run they end at the interval over
    resampled test words or tasks, if there is one.
    """
    sd = clean(row.figures[name].sd)
    low, high = row.intervals.get(name, (None, None))
    if sd is None and low is not None and high is not None:
        middle = center(row, name)
        return max(middle - low, 0.0), max(high - middle, 0.0)
    return sd or 0.0, sd or 0.0


def error_bars(rows: Iterable[Row], name: str) -> dict[str, Any]:
    """Return the error bars of a figure for plotly."""
    bars = [bar(row, name) for row in rows]
    down, up = [down for down, _ in bars], [up for _, up in bars]
    return {"array": up} if down == up else {"array": up, "arrayminus": down, "symmetric": False}


def pareto_panel(results: Results, name: str) -> Panel | None:
    """Return a figure against the measured L0, or None if no row has the figure."""
    lines: dict[str, list[Row]] = {entry: [] for entry in in_order(results.entries)}
    for row in sorted(results.rows, key=lambda row: center(row, "l0")):
        if math.isfinite(center(row, "l0") + center(row, name)):
            lines[row.entry].append(row)
    lines = {entry: rows for entry, rows in lines.items() if rows}
    if not lines:
        return None
    xs = {entry: [center(row, "l0") for row in rows] for entry, rows in lines.items()}
    ys = {entry: [center(row, name) for row in rows] for entry, rows in lines.items()}
    near = [entry for entry in lines if results.entries[entry].role != "control"] or list(lines)
    bars = [
        center(row, name) + side
        for entry in near
        for row in lines[entry]
        for down, up in [bar(row, name)]
        for side in (-down, up)
    ]
    # With a single target the axis shows twice the 5% by which an L0 may miss it.
    asked = [
        share * (row.l0_target or center(row, "l0"))  # the L0 of each entry, if it was found
        for e in near
        for row in lines[e]
        for share in (0.9, 1.1)
    ]
    x_range = axis_range([*asked, *(x for entry in near for x in xs[entry])], xs.values())
    y_range = axis_range(bars, ys.values())
    chart, outside = blank("measured L0"), list[str]()
    for entry, rows in lines.items():
        style = entry_styles(results.entries)[entry]
        for (low, high), values in ((x_range, xs[entry]), (y_range, ys[entry])):
            if entry not in outside and not (low <= min(values) and max(values) <= high):
                outside.append(entry)
        hover = [
            f"{escape(entry)}<br>L0 {center(row, 'l0'):.2f}, target {show_l0(row.l0_target)}<br>"
            f"{figure(name).label} {show_spread(row.figures[name], figure(name).digits)}"
            f" {show_interval(row.intervals.get(name), figure(name).digits)}"
            f" (n = {row.figures[name].n})" + "".join(f"<br>{mark}" for mark in marks(row))
            for row in rows
        ]
        chart.add_scatter(
            x=xs[entry],
            y=ys[entry],
            error_x=error_bars(rows, "l0"),
            error_y=error_bars(rows, name),
            mode="lines+markers",
            line={"color": style.colour, "width": style.width, "dash": style.dash},
            marker={
                "size": 11 if style.width > 2 else 9,
                "symbol": [style.symbol + ("-open" if marks(row) else "") for row in rows],
                "line": {"width": [2 if marks(row) else 0 for row in rows]},
            },
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            meta=entry,
        )
    chart.update_layout(xaxis_range=x_range, yaxis_range=y_range)
    return Panel(f"pareto-{name}", heading(name), {"": chart}, outside, figure(name).meaning)


def l0s(runs: Iterable[Run]) -> list[float]:
    """Return the target L0s, in ascending order."""
    return sorted({run.l0_target for run in runs})


def runs_of(results: Results, entry: str, l0: float) -> list[Run]:
    """Return the runs of an entry at a target L0."""
    return [run for run in results.runs if (run.entry, run.l0_target) == (entry, l0)]


def mean_curve(runs: Iterable[Run], name: str) -> dict[int, float | None]:
    """Return the mean over runs of a field of `Curve`, by step. Missing values are left out."""
    values: dict[int, list[float | None]] = {}
    for curve in [run.curve for run in runs if run.curve]:
        for step, value in zip(curve.steps, getattr(curve, name), strict=False):
            values.setdefault(step, []).append(value)
    return {step: mean(values[step]) for step in sorted(values)}


def curve_panel(results: Results, name: str) -> Panel | None:
    """Return a figure over training, or None if no run has stored it."""
    charts: dict[str, go.Figure] = {}
    for l0 in l0s(results.runs):
        chart, later = blank("training step"), list[float]()
        for entry, style in entry_styles(results.entries).items():
            curve = mean_curve(runs_of(results, entry, l0), name)
            values = [value for value in curve.values() if value is not None]
            if values:
                # The axis leaves out the first tenth, where curves change most.
                later += values[len(values) // 10 + 1 :] or values
                line = {"color": style.colour, "width": style.width, "dash": style.dash}
                add_line(chart, entry, list(curve), list(curve.values()), line=line, meta=entry)
        if later and name == "l0":
            ends = axis_range(
                [math.log10(value) for value in [*later, l0 / 2, l0 * 2] if value > 0]
            )
            ticks = [digit * 10**power for power in range(-2, 6) for digit in (1, 2, 5)]
            labels = [f"{tick:g}" for tick in ticks]
            chart.update_layout(
                yaxis={"type": "log", "range": ends, "tickvals": ticks, "ticktext": labels}
            )
        elif later:
            chart.update_layout(yaxis_range=axis_range(later))
        if later:
            charts[show_l0(l0)] = chart
    meaning = _L0_IN_TRAINING if name == "l0" else figure(name).meaning
    title = heading(name) + (f", {training_window(results)}" if name == "dead_latents" else "")
    return Panel(f"curve-{name}", title, charts, meaning=meaning) if charts else None


def importance_runs(results: Results) -> list[tuple[Run, Importance]]:
    """Return one run of each entry that stored importance: the first seed at its middle L0."""
    chosen: list[tuple[Run, Importance]] = []
    for entry in in_order(results.entries):
        runs = [(run, run.importance) for run in results.runs if run.entry == entry]
        runs = [(run, importance) for run, importance in runs if importance is not None]
        middle = l0s(run for run, _ in runs)
        middle = middle[len(middle) // 2 :][:1]
        runs = [pair for pair in runs if pair[0].l0_target in middle]
        chosen += sorted(runs, key=lambda pair: pair[0].seed)[:1]
    return chosen


def importance_chart(importance: Importance, floor: float) -> go.Figure:
    """Return the median and quartiles of each group, and the threshold, for a logarithmic axis.

    Args:
        importance: importance over training.
        floor: lowest value of the quartiles' bands. Medians of 0 are left out.
    """
    chart = blank("training step")
    for i, (group, quartiles) in enumerate(importance.groups.items()):
        colour = GROUP_COLOURS[i % len(GROUP_COLOURS)]
        points = [
            (step, max(low, floor), middle if middle > 0 else None, high)
            for step, values in zip(importance.steps, quartiles, strict=False)
            for low, middle, high in [[clean(value) for value in values]]
            if low is not None and middle is not None and high is not None and high > 0
        ]
        steps = [step for step, *_ in points]
        band = [low for _, low, *_ in points] + [high for *_, high in points][::-1]
        fill = {"mode": "none", "fill": "toself", "fillcolor": f"{colour}2e", "hoverinfo": "skip"}
        chart.add_scatter(x=steps + steps[::-1], y=band, **fill)
        add_line(chart, f"{group}, median", steps, [m for _, _, m, _ in points], line_color=colour)
    threshold = [clean(value) for value in importance.threshold]
    dashed = {"color": GREY, "dash": "dash"}
    add_line(chart, "threshold", importance.steps, threshold, line=dashed)
    return chart


def importance_panels(results: Results) -> list[tuple[Run, Panel]]:
    """Return a panel for each of `importance_runs`. All have the same axis."""
    chosen = importance_runs(results)
    levels = [
        value
        for _, importance in chosen
        for row in [importance.threshold, *(r for g in importance.groups.values() for r in g)]
        for value in row
        if value is not None and 0 < value < math.inf
    ]
    if not levels:
        return []
    # Without a floor, latents whose importance goes to 0 would take most of the axis.
    floor = max(min(levels), 1e-4 * max(levels))
    axis = {
        "type": "log",
        "range": axis_range([math.log10(floor), math.log10(max(levels))]),
        "dtick": 1,
    }
    panels: list[tuple[Run, Panel]] = []
    for i, (run, importance) in enumerate(chosen):
        chart = importance_chart(importance, floor).update_layout(yaxis=axis)
        panels.append((run, Panel(f"importance-{i}", run.entry, {"": chart})))
    return panels


def tick_label(entry: str) -> str:
    """Return an entry's name as HTML for plotly, with line breaks at spaces and underscores."""
    lines = wrap(entry.replace("_", "_ "), 18)
    return "<br>".join(str(escape(line.replace("_ ", "_"))) for line in lines)


def parents_panel(results: Results) -> Panel | None:
    """Return the absorbed fraction of every parent: one row for each entry, one column a parent.

    The colour scale ends at the highest value of candidates and baselines.
    """
    order = sorted(
        range(len(results.parents)),
        key=lambda i: (results.parents[i].depth, -(results.parents[i].probability or 0)),
    )
    parents = [results.parents[i] for i in order]
    tables: dict[str, dict[str, list[float | None]]] = {}
    top = 0.0
    for l0 in l0s(results.runs):
        for entry in in_order(results.entries):
            runs = [run.absorption_by_parent for run in runs_of(results, entry, l0)]
            runs = [values for values in runs if parents and len(values) == len(parents)]
            if runs:
                row = [mean(values[i] for values in runs) for i in order]
                tables.setdefault(show_l0(l0), {})[entry] = row
                if results.entries[entry].role != "control":
                    top = max([top, *(value for value in row if value is not None)])
    depths = [parent.depth for parent in parents]
    starts = {depth: depths.index(depth) for depth in depths}
    about = [
        f"feature {parent.feature}, depth {parent.depth}"
        f"<br>active in {show(parent.probability, 4)} of the samples"
        for parent in parents
    ]
    charts: dict[str, go.Figure] = {}
    for l0, rows in tables.items():
        charts[l0] = blank("").add_heatmap(
            z=list(rows.values()),
            text=[[f"{escape(entry)}<br>{text}" for text in about] for entry in rows],
            hovertemplate="%{text}<br>absorbed fraction %{z:.3f}<extra></extra>",
            zmin=0,
            zmax=top or 1,
            xgap=1 if len(parents) < 100 else 0,
            colorbar_title_text="absorbed fraction",
        )
        charts[l0].update_layout(
            height=140 + 32 * len(rows),
            margin_t=70,
            xaxis={
                "tickvals": [start + (depths.count(d) - 1) / 2 for d, start in starts.items()],
                "ticktext": [f"depth {d}<br>{depths.count(d)} parents" for d in starts],
                "showgrid": False,
            },
            yaxis={
                "tickvals": list(range(len(rows))),
                "ticktext": [tick_label(entry) for entry in rows],
                "autorange": "reversed",
                "showgrid": False,
            },
            shapes=[
                {"x0": start - 0.5, "x1": start - 0.5, "y0": 0, "y1": 1, "yref": "paper"}
                for start in list(starts.values())[1:]
            ],
        )
    return Panel("parents", "absorbed fraction of each parent", charts) if charts else None
