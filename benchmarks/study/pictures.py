"""Draw the pictures of docs/results.md and docs/choosing.md from committed results.

    python benchmarks/study/pictures.py

Each panel is one kind of data, and each point an architecture with its deviation over seeds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib as mpl
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_lens_atm.compare import read_results

mpl.use("Agg")
ROOT = Path(__file__).parents[2]
COLOURS = {
    "atm": "#d62728",
    "atm (masking off)": "#f4a6a6",
    "atm (only frequency penalty)": "#ff7f0e",
    "atm (only budgets)": "#8b0000",
    "atm (budgets and penalty)": "#e377c2",
    "atm (both off)": "#393b79",
    "topk": "#7f7f7f",
    "batchtopk": "#1f77b4",
    "matryoshka_batchtopk": "#9467bd",
    "jumprelu": "#2ca02c",
    "gated": "#bcbd22",
    "standard": "#8c564b",
    "matching_pursuit": "#637939",
    "hierarchical_topk": "#17becf",
    "lista_matryoshka": "#98df8a",
    "ortsae": "#000000",
}
FAR = 0.15
"""Rows whose L0 is further from the target than this share are not drawn."""
Axis = tuple[str, str]
"""A figure's name in the results, and the label of the axis."""
ABSORBED: Axis = ("absorption_fraction", "absorbed fraction (left is better)")
EXPLAINED: Axis = ("explained_variance", "explained variance (up is better)")
PROBED: Axis = ("sparse_probing_1", "letter probing, one latent (right is better)")
F1: Axis = ("f1", "F1 (up is better)")


class Panel(NamedTuple):
    """One kind of data."""

    title: str
    l0: float
    results: Sequence[str]
    """Files. Of each architecture the first that has it is drawn."""
    x: Axis = ABSORBED
    y: Axis = EXPLAINED


_STUDY = "benchmarks/study/results"
_SISTER_A = "docs/sister-a/results.json"
_SMOLLM2 = (
    f"{_STUDY}/frequency-penalty-smollm2.json",
    "docs/smollm2-135m-l12/results.json",
    "docs/smollm2-135m-l12/peers.json",
)
PICTURES: dict[str, tuple[Panel, ...]] = {
    "docs/results.png": (
        Panel("sister A, true L0", 4, [_SISTER_A]),
        Panel("coverage .2", 4, [f"{_STUDY}/held-out-coverage-20.json"]),
        Panel("coverage .8", 4, [f"{_STUDY}/held-out-coverage-80.json"]),
        Panel("not exclusive", 4, [f"{_STUDY}/held-out-not-exclusive.json"]),
        Panel("one level", 4, [f"{_STUDY}/held-out-flat.json"]),
        Panel("sister A, L0 2", 2, [f"{_STUDY}/other-l0.json"]),
        Panel("sister A, L0 8", 8, [f"{_STUDY}/other-l0.json"]),
    ),
    "docs/choosing.png": (
        Panel(
            "synthetic hierarchy (sister A), true L0",
            4,
            [_SISTER_A, "docs/sister-a/peers.json"],
            y=F1,
        ),
        Panel("SmolLM2-135M, L0 64", 64, _SMOLLM2, x=PROBED),
        Panel("Gemma 3 270M, L0 64", 64, ["docs/gemma-3-270m-l3/results.json"], x=PROBED),
    ),
}


def draw(axes: Axes, panel: Panel) -> None:
    """Draw a point for each architecture."""
    files = (read_results(ROOT / path).rows for path in reversed(panel.results))
    rows = {row.entry: row for found in files for row in found if row.l0_target == panel.l0}
    for row in rows.values():
        x, y = (row.figures.get(name) for name, _ in (panel.x, panel.y))
        is_far = abs(row.figures["l0"].mean / panel.l0 - 1) > FAR
        if row.entry not in COLOURS or is_far or x is None or y is None or y.mean < 0:
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


def main(folder: Annotated[Path, typer.Argument(help="Where docs/ is.")] = ROOT) -> None:
    """Draw both pictures."""
    for output, panels in PICTURES.items():
        columns = min(len(panels), 4)
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(5 * columns, 4 * rows), layout="constrained")
        all_axes = figure.subplots(rows, columns).flatten()
        for axes in all_axes[len(panels) :]:
            axes.axis("off")
        for axes, panel in zip(all_axes, panels, strict=False):
            draw(axes, panel)
        drawn = {
            label: handle
            for axes in all_axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        names = [name for name in COLOURS if name in drawn]
        handles = [drawn[name] for name in names]
        figure.legend(handles, names, loc="outside right center", frameon=False)
        figure.savefig(folder / output, dpi=90)


if __name__ == "__main__":
    typer.run(main)
