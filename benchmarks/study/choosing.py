"""Draw the picture of docs/choosing.md: three kinds of data, a point for each architecture.

python benchmarks/study/choosing.py docs/choosing.png
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_lens_atm.compare import read_results

mpl.use("Agg")
ROOT = Path(__file__).parents[2]
PROBED = ("sparse_probing_1", "letter probing, one latent (right is better)")
EXPLAINED = ("explained_variance", "explained variance (up is better)")


class Panel(NamedTuple):
    """One kind of data. A figure is its name in the results and the label of its axis."""

    title: str
    results: tuple[str, ...]
    """Files. Of each architecture the first that has it is drawn."""
    l0: float
    x: tuple[str, str]
    y: tuple[str, str]


PANELS = (
    Panel(
        "synthetic hierarchy (sister A), true L0",
        ("docs/sister-a/results.json", "docs/sister-a/peers.json"),
        4,
        ("absorption_fraction", "absorbed fraction (left is better)"),
        ("f1", "F1 (up is better)"),
    ),
    Panel(
        "SmolLM2-135M, L0 64",
        (
            "benchmarks/study/results/frequency-penalty-smollm2.json",
            "docs/smollm2-135m-l12/results.json",
            "docs/smollm2-135m-l12/peers.json",
        ),
        64,
        PROBED,
        EXPLAINED,
    ),
    Panel("Gemma 3 270M, L0 64", ("docs/gemma-3-270m-l3/results.json",), 64, PROBED, EXPLAINED),
)
COLOURS = {
    "atm": "#d62728",
    "atm (only frequency penalty)": "#ff7f0e",
    "atm (only budgets)": "#8b0000",
    "atm (budgets and penalty)": "#e377c2",
    "atm (both off)": "#f4a6a6",
    "topk": "#7f7f7f",
    "batchtopk": "#1f77b4",
    "matryoshka_batchtopk": "#9467bd",
    "jumprelu": "#2ca02c",
    "gated": "#bcbd22",
    "standard": "#8c564b",
    "hierarchical_topk": "#17becf",
    "lista_matryoshka": "#98df8a",
    "ortsae": "#000000",
}
FAR = 0.15
"""Rows whose L0 is further from the target than this share are not drawn."""


def draw(axes: Axes, panel: Panel) -> None:
    """Draw a point for each architecture, with its deviation over seeds."""
    files = (read_results(ROOT / path).rows for path in reversed(panel.results))
    rows = {row.entry: row for found in files for row in found if row.l0_target == panel.l0}
    for row in rows.values():
        if row.entry not in COLOURS or abs(row.figures["l0"].mean / panel.l0 - 1) > FAR:
            continue
        x, y = (row.figures[name] for name, _ in (panel.x, panel.y))
        if y.mean < 0:
            continue
        star = row.entry.startswith("atm") and "off" not in row.entry
        axes.errorbar(
            x.mean,
            y.mean,
            xerr=x.sd,
            yerr=y.sd,
            fmt="*" if star else "o",
            markersize=11 if star else 5,
            color=COLOURS[row.entry],
            label=row.entry,
        )
    axes.set(title=panel.title, xlabel=panel.x[1], ylabel=panel.y[1])
    axes.grid(alpha=0.3)


def main(output: Path) -> None:
    """Draw the picture."""
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for axes, panel in zip(panels, PANELS, strict=True):
        draw(axes, panel)
    drawn = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in COLOURS if name in drawn]
    handles = [drawn[name] for name in names]
    figure.legend(handles, names, loc="outside right center", frameon=False)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    typer.run(main)
