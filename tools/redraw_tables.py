"""Redraw the tables of README and docs from the committed results.

    python tools/redraw_tables.py           # rewrite the pages
    python tools/redraw_tables.py --check   # only report the pages that would change

A table stands between `<!-- KIND: PATH -->` (or `<!-- KIND -->`) and `<!-- end -->`. KIND names the
function that draws it, PATH the JSON file that it is drawn from.
"""

import json
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_lens_atm.compare import Results, read_results
from sae_lens_atm.compare.find_l0 import FoundL0
from sae_lens_atm.compare.find_l0.peak import mean_curve
from sae_lens_atm.compare.report.tables import markdown
from sae_lens_atm.compare.report.wording import show_l0
from sae_lens_atm.metrics.figures import FIGURES, figure

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks/study")]
MARKED = re.compile(r"<!-- (?!end)(\w+)(?:: (\S+))? -->\n\n(.*?)\n\n<!-- end -->", re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LETTERS = (
    "l0",
    "explained_variance",
    "ce_loss_score",
    "k1_f1",
    "sparse_probing_1",
    "absorption_full",
)
ON_A_LANGUAGE_MODEL = (
    "l0",
    "explained_variance",
    "ce_loss_score",
    "sparse_probing_1",
    "k1_f1",
    "absorption_full",
    "absorption_fraction",
    "l0_words",
    "probe_auc_k1",
    "dead_latents",
    "stability",
)
OVER_L0 = ("explained_variance", "mcc", "f1", "precision", "recall", "saved_bits")
CEILING = ("explained_variance", "mcc", "f1", "absorption_full", "absorption_fraction")
BESIDE_CEILING = {
    2: "benchmarks/study/results/budgets-other-l0.json",
    4: "docs/sister-a/results.json",
}


def load(path: str) -> Any:
    """Return the parsed JSON of a file of the repository."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def complete(path: str) -> Results:
    """Return the results of a file.

    Raises:
        ValueError: the results are of a `--quick` comparison, or SAEs failed.
    """
    results = read_results(ROOT / path)
    if results.quick or results.failed:
        raise ValueError(f"{path} is quick or has failed SAEs: run the whole comparison again")
    return results


def comparison(path: str) -> str:
    """Return the tables of a results.json, as `sae-lens-atm report` writes them."""
    return markdown(complete(path)).strip()


def language_model(path: str) -> str:
    """Return the tables of a results.json on a language model, with their main columns."""
    return markdown(complete(path), ON_A_LANGUAGE_MODEL).strip()


def script(name: str, function: str) -> Callable[[str], str]:
    """Return the function of a benchmark script that draws a JSON file."""
    return lambda path: getattr(import_module(name), function)(load(path))


def targets(path: str) -> str:
    """Return the table of targets of a results.json."""
    return import_module("targets").table(read_results(ROOT / path))


def language_model_targets(path: str) -> str:
    """Return the table of targets of a results.json on a language model."""
    return import_module("targets").language_model_targets(complete(path))


def summary(_: str) -> str:
    """Return the README's table."""
    return import_module("targets").summary_table()


def ceiling(path: str) -> str:
    """Return the figures of the true dictionary beside ATM's at the same L0."""
    true = load(path)
    ours = [
        row
        for row in read_results(ROOT / BESIDE_CEILING[true["l0"]]).rows
        if row.l0_target == true["l0"]
    ]
    rows = {f"true dictionary, {len(true['runs'])} seeds": [true["mean"][name] for name in CEILING]}
    for row in ours:
        if row.entry in ("atm", "atm (both off)"):
            label = f"{row.entry}, {len(row.seeds)} seeds"
            rows[label] = [row.figures[name].mean for name in CEILING]
    head = f"| | {' | '.join(figure(name).label for name in CEILING)} |"
    cells = (f"| {label} | {' | '.join(f'{v:.4f}' for v in row)} |" for label, row in rows.items())
    bound = f"{true['explained_variance_true_activations']:.4f}"
    first = f"| true dictionary and activations | {bound}{' | -' * (len(CEILING) - 1)} |"
    return "\n".join([head, "|---" + "|--:" * len(CEILING) + "|", first, *cells])


def implied(_: str) -> str:
    """Return the pairs that each rule takes for child and parent, and the energy charged."""
    runs = load("benchmarks/study/results/implied.json")["runs"]
    lines = [
        "| L0 | rule | true pairs | false pairs | energy charged, true pairs | false pairs |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for l0 in sorted({run["l0"] for run in runs}):
        for rule in ("own lift", "mean activation"):
            counts = [run["readings"][rule] for run in runs if run["l0"] == l0]
            mean = {name: sum(c[name] for c in counts) / len(counts) for name in counts[0]}
            pairs = [f"{mean[f'pairs, {kind}']:.0f}" for kind in ("true", "others")]
            energy = [f"{mean[f'energy, {kind}']:.4f}" for kind in ("true", "others")]
            lines.append(f"| {l0} | {rule} | {' | '.join(pairs + energy)} |")
    return "\n".join(lines)


def spelling(_: str) -> str:
    """Return ATM's absorbed fraction on the spelling models beside the best baseline's."""
    results = read_results(ROOT / "docs/spelling-lm/results.json")
    lines = ["| L0 | ATM | best baseline | p |", "|--:|--:|--:|--:|"]
    for test in results.tests:
        if (test.candidate, test.figure) == ("atm", "absorption_fraction"):
            rows = {row.entry: row for row in results.rows if row.l0_target == test.l0_target}
            ours, theirs = (
                rows[entry].figures["absorption_fraction"].mean for entry in ("atm", test.baseline)
            )
            lines.append(
                f"| {show_l0(test.l0_target)} | {ours:.3f} | {theirs:.3f} {test.baseline} "
                f"| {test.p:.2f} |"
            )
    return "\n".join(lines)


def glossary(_: str) -> str:
    """Return the definitions of all figures."""
    rows = [f"| {f.heading} | `{n}` | {f.meaning} |" for n, f in FIGURES.items()]
    return "\n".join(["| figure | in results.json | definition |", "|---|---|---|", *rows])


def weights(path: str) -> str:
    """Return one row of an experiment's SAEs each, with the figures that decided."""
    names = (*LETTERS, "dead_latents")
    rows = read_results(ROOT / path).rows
    several = len({row.l0_target for row in rows}) > 1
    lines = [
        f"| variant | {' | '.join(figure(n).heading for n in names)} |",
        "|---" + "|--:" * len(names) + "|",
    ]
    for row in rows:
        cells = [f"{row.figures[name].mean:.3f}" for name in LETTERS]
        dead = f"{row.figures['dead_latents'].mean:.0f}"
        entry = f"{row.entry}, L0 {show_l0(row.l0_target)}" if several else row.entry
        lines.append(f"| {entry} | {' | '.join([*cells, dead])} |")
    return "\n".join(lines)


def over_l0(path: str) -> str:
    """Return a row for each architecture and L0 of a results.json on synthetic data."""
    heads = [figure(name).heading for name in OVER_L0]
    lines = [f"| | L0 | {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) + 1) + "|"]
    for row in sorted(complete(path).rows, key=lambda row: (row.entry, row.l0_target)):
        cells = [f"{row.figures[name].mean:.{figure(name).digits}f}" for name in OVER_L0]
        lines.append(f"| {row.entry} | {show_l0(row.l0_target)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def found_l0(path: str) -> str:
    """Return the answers of `find-l0`, and what makes each unsure."""
    lines = [
        "| architecture | L0 | 95% interval | saved bits | unsure because |",
        "|---|--:|--:|--:|---|",
    ]
    for name, content in load(path)["entries"].items():
        answer = FoundL0.model_validate(content)
        most = max(mean_curve(answer.rounds[-1].values).values())
        reasons = "; ".join(answer.problems) or "-"
        lines.append(f"| {name} | {' | '.join(answer.as_text)} | {most:.1f} | {reasons} |")
    return "\n".join(lines)


def evaluated(path: str) -> str:
    """Return a row for each SAE of a file of `evaluate --json`, in rising order of L0."""
    names = [n for n in (*ON_A_LANGUAGE_MODEL, "saved_bits") if n != "stability"]
    heads = [figure(name).heading for name in names]
    lines = [f"| SAE | {' | '.join(heads)} |", "|---" + "|--:" * len(names) + "|"]
    for folder, figures in sorted(load(path).items(), key=lambda item: item[1]["l0"]):
        home = Path(folder).parent if Path(folder).name == "sae" else Path(folder)
        cells = (f"{figures[name]:.{figure(name).digits}f}" for name in names)
        lines.append(f"| {home.name.split('-l0-')[0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def language_models(_: str) -> str:
    """Return the README's table of language models."""
    return import_module("targets").language_model_table()


KINDS: dict[str, Callable[[str], str]] = {
    "table": comparison,
    "language_model": language_model,
    "targets": targets,
    "language_model_targets": language_model_targets,
    "summary": summary,
    "language_models": language_models,
    "evaluated": evaluated,
    "ceiling": ceiling,
    "implied": implied,
    "spelling": spelling,
    "glossary": glossary,
    "chance": script("chance", "table"),
    "found_l0": found_l0,
    "found_models": script("found_l0", "table"),
    "weights": weights,
    "over_l0": over_l0,
    "directions": script("error_directions", "table"),
    "l0_figures": script("l0_figures", "table"),
    "falling": script("falling_k", "table"),
    "steps": script("step_time", "table"),
    "baselines": script("baselines", "table"),
    "sentence": script("step_time", "sentence"),
    "evaluation": script("evaluation_cost", "table"),
    "cache": script("cache_speed", "table"),
    "growth": script("step_time", "growth_table"),
    "carried": script("scaling", "carried"),
    "sharded": script("scaling", "sharded"),
}


def redraw(text: str) -> str:
    """Return a page with all its tables drawn again."""

    def table(match: re.Match[str]) -> str:
        kind, path = match[1], match[2] or ""
        scaling = kind == "table" and path.endswith("scaling.json")
        draw = script("scaling", "table") if scaling else KINDS[kind]
        mark = f"{kind}: {path}" if path else kind
        return f"<!-- {mark} -->\n\n{draw(path)}\n\n<!-- end -->"

    return MARKED.sub(table, text)


def main(
    check: Annotated[bool, typer.Option(help="Only report the pages that would change.")] = False,
) -> None:
    """Redraw the tables of README and docs from the committed results."""
    changed = False
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        drawn = redraw(text)
        if drawn != text:
            changed = True
            print(f"{page.relative_to(ROOT)}: {'differs' if check else 'redrawn'}")
            if not check:
                page.write_text(drawn, encoding="utf-8")
    if check and changed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
