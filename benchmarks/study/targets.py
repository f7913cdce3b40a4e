"""Compare ATM with the best baseline: tables of targets, and the README's table of results.

    python benchmarks/study/targets.py docs/sister-a/results.json ...   # tables of targets
    python benchmarks/study/targets.py                                  # the README's table

Each figure has its own best baseline, among the baselines within 5% of the target's L0.
"""

import math
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from sae_lens_atm.compare import read_results
from sae_lens_atm.compare.report.results import Results, Row
from sae_lens_atm.compare.report.wording import show_spread
from sae_lens_atm.metrics.figures import figure

ROOT = Path(__file__).parents[2]
STUDY = "benchmarks/study/results"
SUMMARY = (
    ("sister A", "docs/sister-a/results.json", 4),
    ("sister A, half", f"{STUDY}/other-l0.json", 2),
    ("sister A, twice", f"{STUDY}/other-l0.json", 8),
    ("held out: coverage .2", f"{STUDY}/held-out-coverage-20.json", 4),
    ("held out: coverage .8", f"{STUDY}/held-out-coverage-80.json", 4),
    ("held out: not exclusive", f"{STUDY}/held-out-not-exclusive.json", 4),
    ("held out: one level", f"{STUDY}/held-out-flat.json", 4),
    ("sister B", "docs/sister-b/results.json", 5),
    ("sister B, L0 of `find-l0`", "docs/sister-b/own_l0.json", 0),
)
"""Rows of the README's table: label, results, L0. 0: each architecture at its own L0."""
SUMMARY_FIGURES = ("explained_variance", "f1", "absorption_fraction")
LANGUAGE_MODELS = (
    ("SmolLM2-135M, layer 12", "docs/smollm2-135m-l12/results.json"),
    ("SmolLM2-135M, layer 20", "docs/smollm2-135m-l20/results.json"),
    ("Gemma 3 270M, layer 3", "docs/gemma-3-270m-l3/results.json"),
    ("Gemma 3 270M, layer 9", "docs/gemma-3-270m-l9/results.json"),
)
"""Rows of the README's second table: label and results."""
LANGUAGE_MODEL_FIGURES = (
    *("explained_variance", "ce_loss_score", "sparse_probing_1", "absorption_full", "stability"),
)
ON_LANGUAGE_MODELS, THEIR_L0 = "atm (only budgets)", 64
SEVERAL_STEPS = ("matching_pursuit", "lista_matryoshka")
"""Baselines that encode in several steps. ATM and all others encode in one linear map."""
MINUS = "\N{MINUS SIGN}"


class Target(NamedTuple):
    """A bound on ATM's mean: `factor` times the best baseline's mean, plus `offset`.

    ATM must be at least at the bound, or at most where less is better."""

    name: str
    factor: float = 1.0
    offset: float = 0.0
    than: str = ""
    """The entry to compare with; empty: the best baseline."""
    errors: int = 0
    """By so many standard errors of the difference ATM must be better than the bound."""

    def __str__(self) -> str:
        sign = "≤" if figure(self.name).better < 0 else "≥"
        whom = self.than or "best"
        factor = "" if self.factor == 1 else f"{self.factor:g} x "
        offset = (
            "" if not self.offset else f" {'+' if self.offset > 0 else MINUS} {abs(self.offset):g}"
        )
        side = MINUS if figure(self.name).better < 0 else "+"
        errors = f" {side} {self.errors} standard errors" if self.errors else ""
        return f"{sign} {factor}{whom}{offset}{errors}"


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
"""Targets on models whose parents also fire alone, as in sister A."""
FOR_DICTIONARIES = [
    Target("explained_variance", offset=-0.005),
    Target("mcc", offset=0.03),
    Target("f1", offset=0.03),
    Target("dead_latents"),
    Target("stability"),
]
"""Targets on models where absorption is reported but not ranked, as in sister B."""
FOR_LANGUAGE_MODELS = [
    Target("explained_variance"),
    Target("ce_loss_score"),
    Target("dead_latents", 0.5),
    Target("sparse_probing_1", errors=2),
    Target("k1_f1", errors=2),
    Target("absorption_full", 0.5, than="batchtopk"),
    Target("stability"),
]
"""Targets on real language models."""


def _digits(name: str) -> int:
    return 4 if name.startswith("absorption") else figure(name).digits


def _mean(row: Row, name: str) -> float | None:
    found = row.figures.get(name)
    return None if found is None else found.mean


def at_l0(results: Results, l0: float) -> Results:
    """Return the results at one target L0."""
    rows = [row for row in results.rows if row.l0_target == l0]
    return results.model_copy(update={"rows": rows})


def best_baseline(results: Results, name: str, one_step: bool, than: str = "") -> Row | None:
    """Return the baseline with the best mean of a figure. It is within 5% of the target's L0.

    Args:
        results: the results at one L0.
        name: the figure.
        one_step: leave out baselines that encode in several steps.
        than: take this entry.
    """
    better = figure(name).better
    rows = [
        row
        for row in results.rows
        if (row.entry == than if than else results.entries[row.entry].role == "baseline")
        and row.matched
        and _mean(row, name) is not None
        and not (one_step and results.entries[row.entry].architecture in SEVERAL_STEPS)
    ]
    return max(rows, key=lambda row: better * (_mean(row, name) or 0.0), default=None)


def table(results: Results, candidate: str = "atm") -> str:
    """Return a table with one line for each target: baseline, bound, ATM's figure, met or not."""
    ours = next(row for row in results.rows if row.entry == candidate)
    results = at_l0(results, ours.l0_target)
    targets = FOR_DICTIONARIES if "absorption_full" in results.not_ranked else FOR_ABSORPTION
    several = any(e.architecture in SEVERAL_STEPS for e in results.entries.values())
    head = ["", "target", "baseline", "bound", f"ATM, {len(ours.seeds)} seeds", "met"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|--:|--:|---|"]
    for target in targets:
        for one_step in (True, False) if several and not target.than else (True,):
            against = best_baseline(results, target.name, one_step, target.than)
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


def language_model_targets(results: Results) -> str:
    """Return a table with a line for each target and a column for each L0: figure and bound."""
    l0s = sorted({row.l0_target for row in results.rows})
    heads = " | ".join(f"L0 {l0:g}" for l0 in l0s)
    lines = [f"| | target | {heads} |", "|---|---" + "|---" * len(l0s) + "|"]
    for target in FOR_LANGUAGE_MODELS:
        cells = [_language_model_cell(results, l0, target) for l0 in l0s]
        lines.append(f"| {figure(target.name).label} | {target} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _language_model_cell(results: Results, l0: float, target: Target) -> str:
    results = at_l0(results, l0)
    entries = {row.entry: row for row in results.rows}
    against = best_baseline(results, target.name, True, target.than)
    if against is None:
        return "-"
    ours, theirs = (row.figures[target.name] for row in (entries[ON_LANGUAGE_MODELS], against))
    if ours.mean is None or theirs.mean is None:
        return "-"
    error = math.sqrt(sum((one.sd or 0) ** 2 / one.n for one in (ours, theirs)))
    better, digits = figure(target.name).better, figure(target.name).digits
    bound = target.factor * theirs.mean + target.offset + better * target.errors * error
    reached = f"{ours.mean:.{digits}f}"
    if better * ours.mean >= better * bound:
        reached = f"**{reached}**"
    return f"{reached} / {bound:.{digits}f} {against.entry.removesuffix('_batchtopk')}"


def summary_table() -> str:
    """Return the README's table, ATM / ATM without masks / the best baseline in each cell."""
    heads = (figure(name).heading for name in SUMMARY_FIGURES)
    lines = [f"| data | true L0 | L0 | {' | '.join(heads)} |", "|---|--:|--:|---|---|---|"]
    for label, path, l0 in SUMMARY:
        results = at_l0(read_results(ROOT / path), l0)
        cells = (_summary_cell(results, name) for name in SUMMARY_FIGURES)
        true = results.rows[0].figures["true_l0"].mean
        lines.append(f"| {label} | {true:.1f} | {l0 or 'own'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def language_model_table() -> str:
    """Return the README's second table, ATM / BatchTopK in each cell.

    A row in which one of them is more than 5% off the target L0 is marked and has nothing in bold.
    """
    figures = [figure(name) for name in LANGUAGE_MODEL_FIGURES]
    heads = " | ".join(one.heading for one in figures)
    lines = [f"| model | L0 | {heads} |", "|---|--:" + "|---" * len(figures) + "|"]
    for label, path in LANGUAGE_MODELS:
        rows = at_l0(read_results(ROOT / path), THEIR_L0).rows
        of = {row.entry: row.figures for row in rows}
        compared = (ON_LANGUAGE_MODELS, "batchtopk")
        matched = all(row.matched for row in rows if row.entry in compared)
        cells: list[str] = []
        for name, one in zip(LANGUAGE_MODEL_FIGURES, figures, strict=True):
            values = (of[entry][name].mean for entry in compared)
            ours, theirs = (f"{value:.{one.digits}f}" for value in values)
            lead = one.better * (float(ours) - float(theirs)) if matched else 0.0
            shown = f"**{ours}**" if lead > 0 else ours
            cells.append(f"{shown} / {f'**{theirs}**' if lead < 0 else theirs}")
        mark = "" if matched else " *"
        lines.append(f"| {label}{mark} | {THEIR_L0} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _summary_cell(results: Results, name: str) -> str:
    best = best_baseline(results, name, one_step=True)
    if best is None or name in results.not_ranked:
        return "not ranked"
    entries = {row.entry: row for row in results.rows}
    digits, better = figure(name).digits, figure(name).better
    ours, unmasked, theirs = (
        f"{row.figures[name].mean:.{digits}f}" if row else "-"
        for row in (entries["atm"], entries.get("atm (masking off)"), best)
    )
    lead = better * (float(ours) - float(theirs))  # as shown: equal to the last digit is level
    ours = f"**{ours}**" if lead > 0 else ours
    theirs = f"**{theirs}**" if lead < 0 else theirs
    return f"{ours} / {unmasked} / {theirs} {best.entry.removesuffix('_batchtopk')}"


def main(paths: Annotated[list[Path] | None, typer.Argument()] = None) -> None:
    """Print a table of targets for each results.json; without one, the README's table."""
    if not paths:
        print(summary_table())
    for path in paths or ():
        results = read_results(path)
        print(f"**{results.name}**, L0 {results.rows[0].l0_target:g}\n\n{table(results)}\n")


if __name__ == "__main__":
    typer.run(main)
