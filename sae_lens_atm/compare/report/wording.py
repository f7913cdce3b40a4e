"""Numbers, names and marks as a reader of a comparison meets them."""

import math
from collections.abc import Iterable
from statistics import fmean

from sae_lens_atm.compare.report.results import Entry, Row, Run, Spread
from sae_lens_atm.metrics.figures import figure

P_BOUND = 0.05
"""Below it, and only then, a difference is called better or worse without ado."""
ROLES = ("candidate", "baseline", "control")


def clean(value: float | None) -> float | None:
    """The number, to five digits; None for what is none."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are numbers; None if none is."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return clean(fmean(known)) if known else None


def show(value: float | None, digits: int, sign: str = "-") -> str:
    """A number for reading. What would be rounded to nothing is shown by its magnitude."""
    value = clean(value)
    if not value:
        return "\N{EN DASH}" if value is None else f"{0:.{digits}f}"
    form = ".0e" if abs(value) < 0.5 * 10**-digits else f",.{digits}f"
    return f"{value:{sign}{form}}".replace("-", "\N{MINUS SIGN}")


def show_spread(spread: Spread, digits: int) -> str:
    """Mean ± standard deviation, which a single run has not."""
    sd = "" if clean(spread.sd) is None else f" ± {spread.sd:,.{digits}f}"
    return show(spread.mean, digits) + (sd if clean(spread.mean) is not None else "")


def show_p(p: float | None) -> str:
    return "<0.001" if p is not None and p < 0.001 else show(p, 3)


def show_l0(l0: float) -> str:
    return f"{l0:g}"


def heading(name: str) -> str:
    """A figure's label, with an arrow to its better side that stays with the last word."""
    arrow = ("\N{NO-BREAK SPACE}↓", "", "\N{NO-BREAK SPACE}↑")[figure(name).better + 1]
    return figure(name).label + arrow


def marks(holder: Row | Run) -> list[str]:
    """What is to be known before a row or run is compared with others."""
    return ["L0 off"] * (not holder.matched) + ["moving"] * holder.moving


def in_order(entries: dict[str, Entry]) -> list[str]:
    """Candidates, baselines, controls."""
    return sorted(entries, key=lambda name: ROLES.index(entries[name].role))
