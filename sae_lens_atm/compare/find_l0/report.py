"""The answers of `find-l0` as a table, as notes and as a picture."""

import math
from collections.abc import Mapping
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from sae_lens_atm.compare.find_l0.peak import mean_curve
from sae_lens_atm.compare.find_l0.search import FoundL0
from sae_lens_atm.metrics.figures import figure

PICTURE = "found_l0.png"


def answers_table(found: Mapping[str, FoundL0]) -> Table:
    """Return a table of the answers."""
    table = Table(title="L0 at which an SAE saves the most bits")
    for heading in ("architecture", "L0", "95% interval", "saved bits", "sure"):
        table.add_column(heading, justify="left" if heading == "architecture" else "right")
    for name, answer in found.items():
        most = max(mean_curve(answer.rounds[-1].values).values())
        table.add_row(
            escape(name),
            *answer.as_text,
            f"{most:.1f}",
            "no" if answer.problems else "yes",
        )
    return table


def problem_lines(found: Mapping[str, FoundL0]) -> list[str]:
    """Return a line for each reason why an answer is unsure."""
    return [f"{name}: {problem}" for name, answer in found.items() for problem in answer.problems]


def draw(found: Mapping[str, FoundL0], path: Path) -> None:
    """Draw the curves of each architecture, one for each length of training.

    Args:
        found: the answers.
        path: the PNG file.
    """
    from matplotlib.figure import Figure

    columns = min(len(found), 3)
    rows = math.ceil(len(found) / columns)
    picture = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    axes = picture.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    for axis, (name, answer) in zip(axes, found.items(), strict=False):
        for number, one in enumerate(answer.rounds):
            curve = mean_curve(one.values)
            shade = 0.25 + 0.75 * (number + 1) / len(answer.rounds)
            label = f"{one.length:g} of the training"
            axis.plot(
                list(curve), list(curve.values()), "o-", ms=3, alpha=shade, color="C0", label=label
            )
        axis.axvspan(answer.low, answer.high, color="C1", alpha=0.2, lw=0)
        axis.axvline(answer.l0, color="C1", label=f"found: {answer.as_text[0]}")
        axis.set(xscale="log", title=name, xlabel="L0", ylabel=figure("saved_bits").label)
        axis.legend(fontsize="small")
    picture.savefig(path, dpi=120)
