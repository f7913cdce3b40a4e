"""The files of a comparison. The HTML report is one file that loads nothing from elsewhere.

This module chooses the content. The template `report.html.j2` has the layout and the theme of the
page and its charts.
"""

import base64
import gzip
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from sae_lens_atm.compare.report.charts import (
    CURVES,
    PARETO,
    curve_panel,
    importance_panels,
    parents_panel,
    pareto_panel,
)
from sae_lens_atm.compare.report.notes import measurement_notes
from sae_lens_atm.compare.report.pictures import draw_pictures
from sae_lens_atm.compare.report.results import (
    PairedTest,
    Results,
    Row,
    Run,
    Spread,
    write_results,
)
from sae_lens_atm.compare.report.styles import GREY, GROUP_COLOURS, entry_styles
from sae_lens_atm.compare.report.summary import best_rows
from sae_lens_atm.compare.report.sweep import (
    has_numbers,
    point_lines,
    show_value,
    sweep_panels,
    sweep_styles,
    swept_fields,
)
from sae_lens_atm.compare.report.tables import markdown_page
from sae_lens_atm.compare.report.wording import (
    P_BOUND,
    Cell,
    clean,
    count_latents,
    evaluation_window,
    heading,
    in_order,
    marks,
    number,
    show,
    show_interval,
    show_l0,
    show_p,
    show_spread,
    training_window,
)
from sae_lens_atm.files import write_text
from sae_lens_atm.metrics.figures import FIGURES, figure
from sae_lens_atm.page import templates


class Line(NamedTuple):
    """A row of a table."""

    entry: str
    marks: list[str]
    cells: list[Cell]


class Glance(NamedTuple):
    """The tests of a candidate at a target L0."""

    l0: float
    candidate: str
    marks: list[str]
    tests: list[PairedTest]
    better: int
    """Number of figures in which the candidate is better with p below `P_BOUND`."""
    worse: int


def breakable(name: str) -> Markup:
    """Return a name as HTML, with line breaks allowed after underscores."""
    return Markup("_<wbr>").join(escape(part) for part in name.split("_"))


def figure_names(holders: Sequence[Row] | Sequence[Run]) -> list[str]:
    """Return the names of all figures of rows or runs, in the order of the tables."""
    names = dict.fromkeys(name for holder in holders for name in holder.figures)
    return [name for name in FIGURES if name in names] + [n for n in names if n not in FIGURES]


def table(results: Results, holders: Sequence[Row] | Sequence[Run]) -> list[Line]:
    """Return the lines of a table of rows or runs: by L0, then candidates first.

    The best values are marked among rows, not among runs.
    """
    names, order = figure_names(holders), in_order(results.entries)
    best = {name: best_rows(results, name) for name in names}
    lines: list[Line] = []
    for holder in sorted(holders, key=lambda held: (held.l0_target, order.index(held.entry))):
        seeds = len(holder.seeds) if isinstance(holder, Row) else holder.seed
        cells = [number(holder.l0_target, show_l0(holder.l0_target)), number(seeds, str(seeds))]
        for name in names:
            value = holder.figures.get(name)
            spread = value if isinstance(value, Spread) else Spread(mean=value, sd=None, n=1)
            is_best = isinstance(holder, Row) and (holder.entry, holder.l0_target) in best[name]
            digits = figure(name).digits
            interval = show_interval(holder.intervals.get(name), digits)
            cells.append(number(spread.mean, show_spread(spread, digits), is_best, interval))
        lines.append(Line(holder.entry, marks(holder), cells))
    return lines


def verdict(test: PairedTest) -> tuple[str, str]:
    """Return a symbol and words for the direction of a test.

    A filled symbol stands for p below `P_BOUND`.
    """
    if clean(test.difference) is None:
        return "\N{EN DASH}", "not comparable with"
    if test.better is None or test.difference == 0:
        return ("=", "equal to") if test.difference == 0 else ("≠", "different from")
    open_, filled = ("△", "▲") if test.better else ("▽", "▼")
    sure = test.p is not None and test.p < P_BOUND
    return filled if sure else open_, "better than" if test.better else "worse than"


def make_glances(results: Results) -> list[Glance]:
    """Return the tests by L0 and candidate, in the order of the tables."""
    order = list(FIGURES)
    grouped: dict[tuple[float, str], list[PairedTest]] = {}
    for test in results.tests:
        grouped.setdefault((test.l0_target, test.candidate), []).append(test)
    glances: list[Glance] = []
    for (l0, candidate), tests in sorted(grouped.items(), key=lambda item: item[0][0]):
        tests.sort(key=lambda t: order.index(t.figure) if t.figure in order else len(order))
        rows = [row for row in results.rows if (row.entry, row.l0_target) == (candidate, l0)]
        symbols = [verdict(test)[0] for test in tests]
        better, worse = symbols.count("▲"), symbols.count("▼")
        row_marks = [mark for row in rows for mark in marks(row)]
        glances.append(Glance(l0, candidate, row_marks, tests, better, worse))
    return glances


def plain(charts: dict[str, go.Figure]) -> dict[str, Any]:
    """Return charts as plain values. Plotly's encoder turns NaN into None."""
    return {l0: json.loads(str(chart.to_json())) for l0, chart in charts.items()}


def pretty(value: Any) -> str:
    """Return a value as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


@cache
def packed_plotly() -> str:
    """Return plotly's script, compressed with gzip, in base64: 2 MB instead of 5 MB."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def report_html(results: Results) -> str:
    """Return the HTML report. Names and messages are escaped."""
    pareto = [panel for name in PARETO if (panel := pareto_panel(results, name))]
    curves = [panel for name in CURVES if (panel := curve_panel(results, name))]
    importance, parents = importance_panels(results), parents_panel(results)
    sweep = sweep_panels(results, results.sweep) if results.sweep else []
    panels = [
        *sweep,
        *pareto,
        *curves,
        *(panel for _, panel in importance),
        *([parents] if parents else []),
    ]
    environment = templates("sae_lens_atm.compare.report")
    functions = (
        *(
            breakable,
            count_latents,
            evaluation_window,
            figure,
            heading,
            marks,
            point_lines,
            pretty,
            show,
            show_l0,
        ),
        *(has_numbers, show_p, show_value, sweep_styles, swept_fields, training_window, verdict),
    )
    return environment.get_template("report.html.j2").render(
        {function.__name__: function for function in functions},
        results=results,
        notes=measurement_notes(results),
        styles=entry_styles(results.entries),
        glances=make_glances(results),
        p_bound=P_BOUND,
        sweep=sweep,
        pareto=pareto,
        curves=curves,
        importance=importance,
        group_colours=GROUP_COLOURS,
        grey=GREY,
        parents=parents,
        row_figures=figure_names(results.rows),
        rows=table(results, results.rows),
        run_figures=figure_names(results.runs),
        runs=table(results, results.runs),
        charts={panel.key: plain(panel.charts) for panel in panels},
        plotly=packed_plotly(),
    )


def write_report(results: Results, path: Path) -> Path:
    """Write the HTML report, and return its path."""
    return write_text(path, report_html(results))


def write_all(results: Results, folder: Path) -> list[Path]:
    """Write results, report, tables and pictures, and return their paths."""
    data = write_results(results, folder)
    report = write_report(results, folder / "report.html")
    table = write_text(folder / "tables.md", markdown_page(results))
    return [*data, report, table, *draw_pictures(results, folder)]
