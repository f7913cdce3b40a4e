"""The tables of a comparison, for the terminal and as Markdown."""

import re
from collections.abc import Iterator, Mapping, Sequence

from markupsafe import escape
from rich.table import Table
from rich.text import Text

from sae_lens_atm.compare.report.notes import measurement_notes
from sae_lens_atm.compare.report.results import PairedTest, Results, Row
from sae_lens_atm.compare.report.summary import best_rows, ranked
from sae_lens_atm.compare.report.sweep import show_value, swept_fields
from sae_lens_atm.compare.report.wording import (
    P_BOUND,
    evaluation_window,
    show_interval,
    show_l0,
    show_p,
    show_spread,
    training_window,
)
from sae_lens_atm.metrics.figures import figure

_SHOWN = {
    "l0": "L0",
    "explained_variance": "EV",
    "mcc": "MCC",
    "f1": "F1",
    "absorption_full": "abs. full",
    "absorption_fraction": "abs. frac.",
    "l0_words": "L0 words",
    "probe_f1": "probe F1",
    "k1_f1": "k1 F1",
    "probe_auc_k1": "AUC k1",
    "probe_auc_k5": "AUC k5",
    "ce_loss_score": "CE rec.",
    "kl_div_score": "KL rec.",
    "dead_latents": "dead",
    "stability": "stability",
    "step_ms": "ms a step",
}
"""The figures that fit into a terminal, and their headings. The report has all figures."""
_WITH_INTERVAL = ("absorption_full", "absorption_fraction", "k1_f1")
_ROLE_STYLES = {"candidate": "bold", "baseline": "", "control": "dim"}


def row_tables(results: Results) -> Iterator[Table]:
    """Return one table for each target L0."""
    for l0 in dict.fromkeys(row.l0_target for row in results.rows):
        rows = [row for row in results.rows if row.l0_target == l0]
        names = [name for name in _SHOWN if any(name in row.figures for row in rows)]
        table = Table(title=f"{results.name}, L0 {show_l0(l0)}{_averaged_over(rows)}")
        longest = max(len(row.entry + signs(row)) for row in rows)
        table.add_column("", no_wrap=True, min_width=longest)
        for name in names:
            table.add_column(_SHOWN[name] + figure(name).arrow, justify="right", no_wrap=True)
        best = {name: best_rows(results, name) for name in names}
        for row in rows:
            role = results.entries[row.entry].role
            cells = [_cell(row, name, best) for name in names]
            table.add_row(row.entry + signs(row), *cells, style=_ROLE_STYLES[role])
        yield table


def _averaged_over(rows: list[Row]) -> str:
    most = max((row.seeds for row in rows), key=len)
    if len(most) > len(set(most)):
        return f": mean ± sd over {len(most)} runs, {len(set(most))} seeds on each language model"
    return f": mean ± sd over {len(most)} seeds" if len(most) > 1 else ", one seed"


_IN_MARKDOWN = (
    "l0",
    "explained_variance",
    "mcc",
    "f1",
    "absorption_full",
    "absorption_fraction",
    "l0_words",
    "absorption_full_learned",
    "parents_learned",
    "children_learned",
    "probe_f1",
    "k1_f1",
    "sparse_probing_1",
    "sparse_probing_2",
    "sparse_probing_5",
    "hierarchy_score",
    "probe_auc_k1",
    "probe_auc_k5",
    "probe_auc_raw",
    "contrastive_score",
    "ce_loss_score",
    "kl_div_score",
    "dead_latents",
    "stability",
)


def markdown(results: Results, figures: Sequence[str] = ()) -> str:
    """Return one Markdown table for each target L0, with the best ranked values in bold.

    Args:
        results: the results.
        figures: the columns, without intervals. If empty, all main figures with their intervals.
    """
    blocks: list[str] = []
    for l0 in dict.fromkeys(row.l0_target for row in results.rows):
        rows = [row for row in results.rows if row.l0_target == l0]
        wanted = figures or _IN_MARKDOWN
        names = [name for name in wanted if any(name in row.figures for row in rows)]
        if "k1_f1" in names and not figures:
            names.insert(names.index("parents_learned"), "absorption_fraction_learned")
        heads = [figure(name).heading for name in names]
        best = {name: best_rows(results, name) for name in names}
        lines = ["| " + " | ".join([f"L0 {show_l0(l0)}", *heads]) + " |"]
        lines.append("|---" + "|--:" * len(names) + "|")
        for row in rows:
            cells = [_markdown_cell(row, name, best[name], not figures) for name in names]
            lines.append("| " + " | ".join([_markdown_name(row.entry) + signs(row), *cells]) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def markdown_page(results: Results) -> str:
    """Return the content of `tables.md`: the tables, and what their signs mean."""
    return "\n".join(
        [markdown(results), *(f"- {_escaped(note)}" for note in notes(results, "Bold")), ""]
    )


def _markdown_name(name: str) -> str:
    """Return a name for a cell, in one line."""
    return _escaped(" ".join(name.split()))


def _escaped(text: str) -> str:
    """Return text in which the marks of HTML and of Markdown are escaped."""
    escaped = str(escape(text))
    return re.sub(r"[\\`*|\[\]~]|\b_|_\b", r"\\\g<0>", escaped)


def _markdown_cell(row: Row, name: str, best: set[tuple[str, float]], with_interval: bool) -> str:
    if name not in row.figures:
        return ""
    digits = figure(name).digits
    text = show_spread(row.figures[name], digits).replace(" ± ", "±")
    text = f"**{text}**" if (row.entry, row.l0_target) in best else text
    interval = show_interval(row.intervals.get(name), digits) if with_interval else ""
    return f"{text} {interval}".strip()


def signs(row: Row) -> str:
    """Return the signs after an entry's name: ``*`` off target, ``~`` not converged."""
    return (" *" if not row.matched else "") + (" ~" if row.moving else "")


def notes(results: Results, best: str = "Green") -> list[str]:
    """Return sentences that explain the tables.

    Args:
        results: the results of the tables.
        best: how the best values are marked.
    """
    window, sweep = training_window(results), results.sweep
    sentences = [
        "* L0 more than 5% off the target: not ranked.",
        f"~ not converged: explained variance or dead latents ({window}) still changed at the end.",
    ]
    figures = {name for row in results.rows for name in row.figures}
    if "dead_latents" in figures and sweep is None:
        sentences.append(f"dead: latents that fire on none of the {evaluation_window(results)}.")
    if sweep is None:
        sentences.append(f"{best}: the best ranked value, controls excluded.")
    return sentences + measurement_notes(results)


def _cell(row: Row, name: str, best: Mapping[str, set[tuple[str, float]]]) -> Text:
    if name not in row.figures:
        return Text("")
    text = show_spread(row.figures[name], figure(name).digits).replace(" ± ", "±")
    text = text.replace("±0.", "±.")
    if row.figures[name].sd is None and name in _WITH_INTERVAL:
        interval = show_interval(row.intervals.get(name), 2)
        text = f"{text} {interval.replace('0.', '.').replace(', ', ',')}".strip()
    return Text(text, style="green" if (row.entry, row.l0_target) in best[name] else "")


def test_table(results: Results) -> Table | None:
    """Return the candidates against the best baseline of each figure, or None without tests."""
    shown = [test for test in results.tests if test.figure in _SHOWN]
    if not shown:
        return None
    title = f"Candidates against the best baseline, paired by seed. Coloured: p < {P_BOUND}"
    table = Table(title=title)
    for name in ("", "L0", "figure", "best baseline", "difference", "", "p"):
        table.add_column(name, justify="right" if name in ("L0", "difference", "p") else "left")
    for test in shown:
        table.add_row(*_test_cells(test))
    return table


def _test_cells(test: PairedTest) -> tuple[str | Text, ...]:
    sure = test.p is not None and test.p < P_BOUND
    better, worse = Text("better", "green" if sure else ""), Text("worse", "red" if sure else "")
    verdict = {True: better, False: worse, None: Text("equal")}
    off_target = f" (off target: {', '.join(test.off_target)})" if test.off_target else ""
    difference = "-" if test.difference is None else f"{test.difference:+.4f}"
    return (
        test.candidate,
        show_l0(test.l0_target),
        figure(test.figure).label,
        test.baseline + off_target,
        difference,
        verdict[test.better],
        "-" if test.p is None else f"{show_p(test.p)} (n={test.n})",
    )


def sweep_tables(results: Results, most: int = 10) -> Iterator[Table]:
    """Return the best points of a sweep, one table for each L0. Points off target come last.

    Args:
        results: results of a sweep.
        most: number of rows of a table.
    """
    sweep = results.sweep
    assert sweep is not None
    shown = figure(sweep.objective)
    keys = swept_fields(sweep)
    several = len({point.entry for point in sweep.points.values()}) > 1
    for l0 in dict.fromkeys(row.l0_target for row in results.rows):
        rows = ranked(results, l0)
        best = f", best {most} of {len(rows)}" if len(rows) > most else ""
        table = Table(title=f"{results.name}, L0 {show_l0(l0)}{_averaged_over(rows)}{best}")
        if several:
            table.add_column("", no_wrap=True)
        for key in keys:
            table.add_column(key.removeprefix("sae."), justify="right", no_wrap=True)
        heads = {"l0": _SHOWN["l0"], sweep.objective: shown.heading}
        for head in heads.values():
            table.add_column(head, justify="right", no_wrap=True)
        for row in rows[:most]:
            point = sweep.points[row.entry]
            values = [show_value(point.values.get(key, "")) for key in keys]
            cells = [_cell(row, name, {name: set() for name in heads}) for name in heads]
            cells[0].append(signs(row))
            table.add_row(*([point.entry] if several else []), *values, *cells)
        yield table
