"""The section of a sweep in the HTML report: its points, best first, and a chart of each field."""

from itertools import cycle
from typing import Any, NamedTuple

from markupsafe import escape

from sae_lens_atm.compare.report.charts import Panel, blank, center, error_bars
from sae_lens_atm.compare.report.results import Results, Row, Spread, Sweep
from sae_lens_atm.compare.report.styles import PALETTE, SYMBOLS, is_logarithmic
from sae_lens_atm.compare.report.summary import ranked
from sae_lens_atm.compare.report.wording import (
    Cell,
    clean,
    heading,
    marks,
    number,
    show_l0,
    show_spread,
)
from sae_lens_atm.metrics.figures import figure


class PointLine(NamedTuple):
    """A point of a sweep at one target L0."""

    l0: float
    rank: int | None
    """1 for the best. None: off the target L0, or without the objective."""
    entry: str
    values: list[Any]
    """Value of each swept field; None for a field that the entry does not have."""
    cells: list[Cell]
    """Measured L0 and objective."""
    marks: list[str]


def swept_fields(sweep: Sweep) -> list[str]:
    """Return the names of the swept fields."""
    return list(dict.fromkeys(key for point in sweep.points.values() for key in point.values))


def has_numbers(sweep: Sweep, key: str) -> bool:
    """Return whether all values of a swept field are numbers."""
    values = [point.values[key] for point in sweep.points.values() if key in point.values]
    return all(type(value) in (int, float) for value in values)


def show_value(value: Any) -> str:
    """Return the value of a swept field as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def point_lines(results: Results, sweep: Sweep) -> list[PointLine]:
    """Return the points of a sweep by L0, best first."""
    lines: list[PointLine] = []
    for l0 in sorted({row.l0_target for row in results.rows}):
        for rank, row in enumerate(ranked(results, l0), 1):
            point = sweep.points[row.entry]
            has_rank = row.matched and clean(center(row, sweep.objective)) is not None
            lines.append(
                PointLine(
                    l0=l0,
                    rank=rank if has_rank else None,
                    entry=point.entry,
                    values=[point.values.get(key) for key in swept_fields(sweep)],
                    cells=[_cell(row, name) for name in ("l0", sweep.objective)],
                    marks=marks(row),
                )
            )
    return lines


def _cell(row: Row, name: str) -> Cell:
    spread = row.figures.get(name, Spread(mean=None, sd=None, n=0))
    return number(spread.mean, show_spread(spread, figure(name).digits))


def sweep_panels(results: Results, sweep: Sweep) -> list[Panel]:
    """Return a chart of the objective against each swept field, for each target L0."""
    panels: list[Panel] = []
    for i, key in enumerate(swept_fields(sweep)):
        charts = {
            show_l0(l0): _chart([row for row in results.rows if row.l0_target == l0], sweep, key)
            for l0 in sorted({row.l0_target for row in results.rows})
        }
        title = f"{heading(sweep.objective)} against {key}"
        panels.append(Panel(f"sweep-{i}", title, charts, meaning=figure(sweep.objective).meaning))
    return panels


def sweep_styles(sweep: Sweep) -> dict[str, tuple[str, str]]:
    """Return the colour and the symbol of each entry of the sweep file."""
    entries = dict.fromkeys(point.entry for point in sweep.points.values())
    return dict(zip(entries, zip(cycle(PALETTE), cycle(SYMBOLS), strict=False), strict=False))


def _chart(rows: list[Row], sweep: Sweep, key: str) -> Any:
    chart = blank(str(escape(key)))
    values = [point.values[key] for point in sweep.points.values() if key in point.values]
    are_numbers = has_numbers(sweep, key)
    if are_numbers and is_logarithmic(values):
        chart.update_layout(xaxis={"type": "log", "dtick": "D2", "tickformat": "~g"})
    elif not are_numbers:
        chart.update_layout(xaxis_type="category")
    for entry, (colour, symbol) in sweep_styles(sweep).items():
        shown = [
            row
            for row in rows
            if sweep.points[row.entry].entry == entry
            and key in sweep.points[row.entry].values
            and clean(center(row, sweep.objective)) is not None
        ]
        xs = [sweep.points[row.entry].values[key] for row in shown]
        chart.add_scatter(
            x=xs if are_numbers else [str(escape(show_value(x))) for x in xs],
            y=[center(row, sweep.objective) for row in shown],
            error_y=error_bars(shown, sweep.objective),
            mode="markers",
            marker={
                "color": colour,
                "size": 9,
                "symbol": [symbol + ("-open" if marks(row) else "") for row in shown],
            },
            customdata=[_hover(row, sweep) for row in shown],
            hovertemplate="%{customdata}<extra></extra>",
            name=str(escape(entry)),
        )
    return chart


def _hover(row: Row, sweep: Sweep) -> str:
    point, shown = sweep.points[row.entry], figure(sweep.objective)
    lines = [
        point.entry,
        *(f"{name} {show_value(value)}" for name, value in point.values.items()),
        f"{shown.label} {show_spread(row.figures[sweep.objective], shown.digits)}",
        *marks(row),
    ]
    return "<br>".join(str(escape(line)) for line in lines)
