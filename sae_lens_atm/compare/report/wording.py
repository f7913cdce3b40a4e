"""Text for numbers, names and marks in reports and tables."""

import math
from collections.abc import Iterable
from statistics import fmean
from typing import NamedTuple

from sae_lens_atm.compare.report.results import (
    FOUND_LEVEL,
    Entry,
    Interval,
    Results,
    Row,
    Run,
    Spread,
)
from sae_lens_atm.metrics.figures import figure

P_BOUND = 0.05
"""p value below which a difference is highlighted."""
ROLES = ("candidate", "baseline", "control")


class Cell(NamedTuple):
    """A number in a table."""

    text: str
    value: str
    """Value by which the column is sorted. Empty values come last."""
    best: bool = False
    interval: str = ""
    """The 95% interval over resampled test words or tasks."""


def clean(value: float | None) -> float | None:
    """Return a number rounded to five digits, or None for NaN, infinity and None."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the finite values, or None if there are none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return clean(fmean(finite)) if finite else None


def show(value: float | None, digits: int, sign: str = "-") -> str:
    """Return a number as text. One that would be rounded to 0 is shown as a power of ten.

    Args:
        value: the number. None, NaN and infinity are shown as a dash.
        digits: digits after the point.
        sign: "+" to show the sign of positive numbers, too.
    """
    value = clean(value)
    if not value:
        return "\N{EN DASH}" if value is None else f"{0:.{digits}f}"
    form = ".0e" if abs(value) < 0.5 * 10**-digits else f",.{digits}f"
    return f"{value:{sign}{form}}".replace("-", "\N{MINUS SIGN}")


def show_spread(spread: Spread, digits: int) -> str:
    """Return mean ± standard deviation, or the mean alone for a single run."""
    sd = "" if clean(spread.sd) is None else f" ± {spread.sd:,.{digits}f}"
    return show(spread.mean, digits) + (sd if clean(spread.mean) is not None else "")


def show_interval(interval: Interval | None, digits: int) -> str:
    """Return an interval in brackets, or "" without one."""
    if interval is None or clean(interval[0]) is None or clean(interval[1]) is None:
        return ""
    return f"[{show(interval[0], digits)}, {show(interval[1], digits)}]"


def show_p(p: float | None) -> str:
    """Return a p value as text."""
    return "<0.001" if p is not None and p < 0.001 else show(p, 3)


def show_l0(l0: float) -> str:
    """Return a target L0 as text."""
    return "found" if l0 == FOUND_LEVEL else f"{l0:g}"


def count_latents(number: int) -> str:
    """Return a number of latents as text."""
    return f"{number:,} latent{'s' if number != 1 else ''}"


def number(value: float | None, text: str, best: bool = False, interval: str = "") -> Cell:
    """Return the cell of a number."""
    value = clean(value)
    return Cell(text, "" if value is None else repr(value), best, interval)


def heading(name: str) -> str:
    """Return a figure's label and an arrow to its better values, which stay in one line."""
    shown = figure(name)
    return shown.label + shown.arrow.replace(" ", "\N{NO-BREAK SPACE}")


def training_window(results: Results) -> str:
    """Return the window in which curves count dead latents."""
    trainers = [entry.settings.get("trainer", {}) for entry in results.entries.values()]
    steps = _span(trainer.get("dead_feature_window") for trainer in trainers)
    return f"last {steps or 'dead_feature_window'} steps"


def evaluation_window(results: Results) -> str:
    """Return the window in which tables count dead latents."""
    figures = (run.figures for run in results.runs)
    samples = _span(f.get("dead_window", f.get("evaluated_samples")) for f in figures)
    unit = "tokens" if results.config.get("runner") == "language_model" else "samples"
    return f"{samples} evaluated {unit}".lstrip()


def _span(numbers: Iterable[float | None]) -> str:
    found = [int(number) for number in numbers if number is not None]
    ends = dict.fromkeys((min(found), max(found))) if found else ()
    return " to ".join(f"{end:,}" for end in ends)


def marks(holder: Row | Run) -> list[str]:
    """Return the marks of a row or run that is not fully comparable with others."""
    return ["L0 off target"] * (not holder.matched) + ["not converged"] * holder.moving


def in_order(entries: dict[str, Entry]) -> list[str]:
    """Return the names of the entries: candidates, then baselines, then controls."""
    return sorted(entries, key=lambda name: ROLES.index(entries[name].role))
