"""Draw explained variance against the absorbed fraction, one panel for each kind of data.

python benchmarks/study/picture.py docs/results.png
"""

from pathlib import Path

import matplotlib as mpl
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_lens_atm.compare import read_results

mpl.use("Agg")
ROOT = Path(__file__).parents[2]
PANELS = {
    "sister A, true L0": "docs/sister-a/results.json",
    "coverage .2": "benchmarks/study/results/held-out-coverage-20.json",
    "coverage .8": "benchmarks/study/results/held-out-coverage-80.json",
    "not exclusive": "benchmarks/study/results/held-out-not-exclusive.json",
    "one level": "benchmarks/study/results/held-out-flat.json",
    "sister A, L0 2": "benchmarks/study/results/other-l0.json",
    "sister A, L0 8": "benchmarks/study/results/other-l0.json",
}
COLOURS = {
    "atm": "#d62728",
    "atm (masking off)": "#f4a6a6",
    "topk": "#7f7f7f",
    "batchtopk": "#1f77b4",
    "matryoshka_batchtopk": "#9467bd",
    "jumprelu": "#2ca02c",
    "gated": "#bcbd22",
    "standard": "#8c564b",
    "matching_pursuit": "#17becf",
}


def draw(axes: Axes, title: str, path: str) -> None:
    """Draw one panel: a point for each architecture, with its deviation over seeds."""
    wanted = float(title.rsplit(" ", 1)[1]) if "L0 " in title[:-1] and title[-1].isdigit() else None
    for row in read_results(ROOT / path).rows:
        if row.entry not in COLOURS or (wanted is not None and row.l0_target != wanted):
            continue
        absorbed, explained = (
            row.figures[name] for name in ("absorption_fraction", "explained_variance")
        )
        axes.errorbar(
            absorbed.mean,
            explained.mean,
            xerr=absorbed.sd,
            yerr=explained.sd,
            fmt="*" if row.entry == "atm" else "o",
            markersize=11 if row.entry == "atm" else 5,
            color=COLOURS[row.entry],
            label=row.entry,
        )
    axes.set(title=title, xlim=(0, None))
    axes.grid(alpha=0.3)


def main(output: Path) -> None:
    """Draw the picture."""
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    panels = figure.subplots(2, 4).flatten()
    for axes, (title, path) in zip(panels, PANELS.items(), strict=False):
        draw(axes, title, path)
    for axes in panels[[0, 4]]:
        axes.set_ylabel("explained variance (up is better)")
    for axes in panels[4:7]:
        axes.set_xlabel("absorbed fraction (left is better)")
    panels[7].axis("off")
    panels[7].legend(*panels[0].get_legend_handles_labels(), loc="center", frameon=False)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    typer.run(main)
