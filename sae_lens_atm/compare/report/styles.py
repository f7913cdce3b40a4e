"""Colours, lines and axes of the charts, in the HTML report and in the pictures."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sae_lens_atm.compare.report.results import Entry
from sae_lens_atm.compare.report.wording import in_order

# The colours of Okabe and Ito without black and yellow, with a darker orange and sky blue, and two
# more. Each has a contrast of 3 or more with the light and with the dark page.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#C88400", "#3C9BD6", "#8A6FC0", "#A65628")
GROUP_COLOURS = ("#AA4499", "#2E9E8C", "#B8860B", "#6C7BD0", "#CC6677")
GREY = "#858585"
DASHES = ("dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "triangle-down", "cross")


class Style(NamedTuple):
    """The style of an entry, the same in all charts."""

    colour: str
    dash: str
    symbol: str
    width: float


def entry_styles(entries: dict[str, Entry]) -> dict[str, Style]:
    """Return the style of each entry.

    Candidates have thick lines. Controls are grey and dashed. With more entries than colours, the
    colours repeat with dashed lines.
    """
    styles: dict[str, Style] = {}
    for i, name in enumerate(in_order(entries)):
        symbol, width = SYMBOLS[i % len(SYMBOLS)], 1.6
        if entries[name].role == "control":
            greys = sum(style.colour == GREY for style in styles.values())
            styles[name] = Style(GREY, DASHES[greys % len(DASHES)], symbol, width)
        else:
            width = 3.5 if entries[name].role == "candidate" else width
            dash = ("solid", *DASHES)[i // len(PALETTE) % (len(DASHES) + 1)]
            styles[name] = Style(PALETTE[i % len(PALETTE)], dash, symbol, width)
    return styles


def is_logarithmic(values: Sequence[float]) -> bool:
    """Return whether an axis of these values is logarithmic: their ratio is 8 or more."""
    return 0 < 8 * min(values) <= max(values)


def axis_range(values: Sequence[float], optional: Iterable[Sequence[float]] = ()) -> list[float]:
    """Return the ends of an axis.

    Args:
        values: the range covers all of them.
        optional: groups of values, such as the controls. The range covers a group if it exceeds the
            span of `values` by at most one half on each side.
    """
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    near = [e for e in optional if low - span / 2 <= min(e) and max(e) <= high + span / 2]
    low, high = min([low, *map(min, near)]), max([high, *map(max, near)])
    pad = 0.07 * (high - low or span)
    return [low - pad, high + pad]
