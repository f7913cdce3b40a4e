"""Print tables of the study's targets and of the figures that ATM reached.

    python benchmarks/study/targets.py docs/sister-a/results.json ...

The best baseline is chosen for each figure, among the rows within 5% of the target L0.
"""

from pathlib import Path
from typing import NamedTuple

import typer

from sae_lens_atm.compare import read_results
from sae_lens_atm.compare.report.results import Results, Row
from sae_lens_atm.compare.report.wording import show_spread
from sae_lens_atm.metrics.figures import figure

SEVERAL_STEPS = ("matching_pursuit",)
"""Architectures whose encoder takes several steps. All others encode with one linear map."""
MINUS = "\N{MINUS SIGN}"


class Target(NamedTuple):
    """A bound for ATM's mean of a figure: `factor` times the best baseline's mean, plus `offset`.

    It is an upper bound for figures where lower is better, and a lower bound for the others.
    """

    name: str
    factor: float = 1.0
    offset: float = 0.0
    than: str = ""
    """Entry to compare with. Empty: the best baseline."""

    def __str__(self) -> str:
        sign = "≤" if figure(self.name).better < 0 else "≥"
        whom = self.than or "best"
        factor = "" if self.factor == 1 else f"{self.factor:g} x "
        offset = (
            "" if not self.offset else f" {'+' if self.offset > 0 else MINUS} {abs(self.offset):g}"
        )
        return f"{sign} {factor}{whom}{offset}"


_ABSORPTION = (
    "absorption_full",
    "absorption_fraction",
    "absorption_full_learned",
    "absorption_fraction_learned",
)
FOR_ABSORPTION = [
    *(Target(name, 0.3) for name in _ABSORPTION),
    *(Target(name, 0.05, than="topk") for name in _ABSORPTION),
    Target("explained_variance"),
    Target("mcc", offset=0.05),
    Target("f1", offset=0.10),
    Target("dead_latents"),
    Target("stability"),
]
"""Targets for models whose parents also fire alone, such as sister A."""
FOR_DICTIONARIES = [
    Target("explained_variance", offset=-0.005),
    Target("mcc", offset=0.03),
    Target("f1", offset=0.03),
    Target("dead_latents"),
    Target("stability"),
]
"""Targets for models on which absorption is not ranked: sister B."""


def _digits(name: str) -> int:
    return 4 if name.startswith("absorption") else figure(name).digits


def _mean(row: Row, name: str) -> float | None:
    spread = row.figures.get(name)
    return None if spread is None else spread.mean


def best_baseline(results: Results, name: str, one_step: bool) -> Row | None:
    """Return the baseline with the best mean of a figure, or None.

    Args:
        results: results of a comparison.
        name: name of the figure.
        one_step: leave out architectures whose encoder takes several steps.
    """
    better = figure(name).better
    rows = [
        row
        for row in results.rows
        if results.entries[row.entry].role == "baseline"
        and row.matched
        and _mean(row, name) is not None
        and not (one_step and results.entries[row.entry].architecture in SEVERAL_STEPS)
    ]
    return max(rows, key=lambda row: better * (_mean(row, name) or 0.0), default=None)


def table(results: Results, candidate: str = "atm") -> str:
    """Return a Markdown table with one line for each target and baseline."""
    ours = next(row for row in results.rows if row.entry == candidate)
    targets = FOR_DICTIONARIES if "absorption_full" in results.not_ranked else FOR_ABSORPTION
    several = any(e.architecture in SEVERAL_STEPS for e in results.entries.values())
    head = ["", "target", "baseline", "bound", f"ATM, {len(ours.seeds)} seeds", "met"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|--:|--:|---|"]
    for target in targets:
        for one_step in (True, False) if several and not target.than else (True,):
            against = (
                next((row for row in results.rows if row.entry == target.than), None)
                if target.than
                else best_baseline(results, target.name, one_step)
            )
            better = figure(target.name).better
            theirs, reached = against and _mean(against, target.name), _mean(ours, target.name)
            if against is None or theirs is None or reached is None:
                continue
            if not one_step and results.entries[against.entry].architecture not in SEVERAL_STEPS:
                continue
            bound = target.factor * theirs + target.offset
            digits = _digits(target.name)
            met = better * reached >= better * bound
            cells = [
                figure(target.name).label,
                str(target),
                f"{against.entry} {show_spread(against.figures[target.name], digits)}",
                f"{bound:.{digits}f}",
                show_spread(ours.figures[target.name], digits),
                "yes" if met else "no",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(paths: list[Path]) -> None:
    """Print a table for each results.json."""
    for path in paths:
        results = read_results(path)
        print(f"**{results.name}**, L0 {results.rows[0].l0_target:g}\n\n{table(results)}\n")


if __name__ == "__main__":
    typer.run(main)
