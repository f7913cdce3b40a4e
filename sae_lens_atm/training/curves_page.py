"""The page `training.html` of a run: its figures over the training steps, from its history."""

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens_atm.files import write_text
from sae_lens_atm.page import templates
from sae_lens_atm.training.history import HISTORY_FILENAME

CURVES_FILENAME = "training.html"
CURVES = {
    "loss": ("loss", "Mean of the step's batch, with all its terms."),
    "explained_variance": (
        "explained variance",
        "Of the step's batch: 1 minus the squared error over the variance.",
    ),
    "l0": ("L0", "Number of latents that fire on a sample, in the step's batch."),
    "dead_latents": (
        "dead latents",
        "Latents that fire on no sample of the last dead_feature_window steps.",
    ),
    "masked_fraction": (
        "share masked",
        "Share of the latents that the mask of the step turns off.",
    ),
}
"""The figures of a page, with their titles and meanings."""
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 460, 220, 52, 6, 20
_LOGARITHMIC = 8  # ratio of the largest value to the smallest from which an axis is logarithmic
_LOWEST = {"explained_variance": 0.0}  # untrained SAEs have values far below


class Chart(NamedTuple):
    """A figure over the steps."""

    title: str
    meaning: str
    path: str
    """The path of SVG."""
    low: str
    high: str
    first: str
    last: str
    end: str
    """The last value."""
    logarithmic: bool
    cut: bool
    """Whether values lie below the axis."""


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's history. A row that is not complete is left out."""
    rows: list[dict[str, Any]] = []
    path = folder / HISTORY_FILENAME
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def draw_chart(name: str, rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Return the chart of a figure, or None if the history has fewer than two of its values."""
    title, meaning = CURVES[name]
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if len(points) < 2:
        return None
    steps, values = [step for step, _ in points], [value for _, value in points]
    lowest, cut = _LOWEST.get(name, -math.inf), False
    if values[-1] > lowest > min(values):
        values, cut = [max(value, lowest) for value in values], True
    low, high = min(values), max(values)
    if low == high:  # the axis of a constant begins or ends at 0
        low, high = min(low, 0), max(high, 0) or 1
    logarithmic = 0 < _LOGARITHMIC * low <= high
    scale = math.log if logarithmic else float
    span = (scale(high) - scale(low)) or 1.0
    length = (steps[-1] - steps[0]) or 1
    places = [
        f"{_LEFT + (_WIDTH - _LEFT) * (step - steps[0]) / length:.1f},"
        f"{_TOP + (_HEIGHT - _TOP - _BOTTOM) * (scale(high) - scale(value)) / span:.1f}"
        for step, value in zip(steps, values, strict=True)
    ]
    return Chart(
        title=title,
        meaning=meaning,
        path=f"M{'L'.join(places)}",
        low=_number(low),
        high=_number(high),
        first=_number(steps[0]),
        last=_number(steps[-1]),
        end=_number(points[-1][1]),
        logarithmic=logarithmic,
        cut=cut,
    )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def curves_html(title: str, facts: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the page of a run. Names are escaped.

    Args:
        title: the title.
        facts: names and values above the charts.
        rows: the history of the run.
    """
    environment = templates("sae_lens_atm.training")
    charts = [chart for name in CURVES if (chart := draw_chart(name, rows)) is not None]
    return environment.get_template("curves.html.j2").render(
        title=title,
        facts=facts,
        charts=charts,
        width=_WIDTH,
        height=_HEIGHT,
        left=_LEFT,
        top=_TOP,
        bottom=_BOTTOM,
    )


def write_curves(folder: Path, facts: Mapping[str, str]) -> None:
    """Write the page of a run from its history, if it has one. An error is only a warning."""
    try:
        rows = read_history(folder)
        if rows:
            write_text(folder / CURVES_FILENAME, curves_html(folder.resolve().name, facts, rows))
    except OSError as error:  # the run is worth more than its curves
        warnings.warn(f"cannot write {folder / CURVES_FILENAME}: {error.strerror}", stacklevel=2)
