"""The L0 that `find-l0` finds on synthetic models, beside the true L0.

Print the commands of the searches, run them, and collect their answers in a file:

    python benchmarks/study/found_l0.py commands
    python benchmarks/study/found_l0.py collect runs found_models.json

A search with ATM writes to `runs/l0-NAME-l0`, one with other architectures to
`runs/others-NAME-l0`. It can be stopped and repeated.
"""

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sae_lens.util import temporary_seed

from sae_lens_atm.compare.find_l0 import FoundL0
from sae_lens_atm.compare.plan.comparison_file import load_comparison
from sae_lens_atm.compare.run.batch_pool import synthetic_model
from sae_lens_atm.files import read_json, to_json
from sae_lens_atm.training.run_file import SyntheticRun

ROOT = Path(__file__).parents[2]
SAMPLES, BATCH, SEED = 100_000, 10_000, 0
CLOSE = 1.15
"""The target: found and true L0 within this ratio."""
Entries = dict[str, dict[str, Any]]
ATM: Entries = {"atm": {"role": "candidate"}}
OTHERS: Entries = {
    "atm (both off)": {"architecture": "atm", "sae": {"mask_rate": 0, "parent_weight": 0}},
    "topk": {},
    "batchtopk": {},
    "jumprelu": {"sae": {"l0_coefficient": 0.01, "l0_warm_up_steps": 200}},
}
OF_SISTER_B: Entries = {
    **ATM,
    **{name: OTHERS[name] for name in ("batchtopk", "atm (both off)", "topk")},
    "matryoshka_batchtopk": {"sae": {"matryoshka_widths": [8, 32, 128, 256]}},
    "lista_matryoshka": {"sae": {"matryoshka_widths": [8, 32, 128]}},
}
SHORT: dict[str, tuple[Entries, int]] = {
    "sister-b": (OF_SISTER_B, 2),
    "sister-b-wide": (ATM, 1),
    "synthsaebench-4k": (ATM, 1),
}
"""Models that are searched with half of the training: the architectures, and the seeds."""
HALF = ("training_samples=1536000", "lr_decay_steps=450", "lr_warm_up_steps=50")
"""Settings of half the training, as other architectures than ATM have it."""
_SISTER_A = "configs/compare-sister-a.yaml"
_ROOTS = {"max_root_probability": 0.25, "min_root_probability": 0.04, "lone_probability": 0.02}


def _sister_a_times(factor: float) -> tuple[str, list[str]]:
    """Return sister A with all probabilities of roots and lone features multiplied."""
    return _SISTER_A, [f"hierarchy_model.{k}={v * factor:g}" for k, v in _ROOTS.items()]


MODELS: dict[str, tuple[str, list[str]]] = {
    "sister-a": (_SISTER_A, []),
    "halved": _sister_a_times(0.5),
    "doubled": _sister_a_times(2),
    "cov20": ("benchmarks/study/held-out-coverage-20.yaml", []),
    "cov80": ("benchmarks/study/held-out-coverage-80.yaml", []),
    "flat": ("benchmarks/study/held-out-flat.yaml", []),
    "not-exclusive": ("benchmarks/study/held-out-not-exclusive.yaml", []),
    "sister-b": ("configs/compare-sister-b.yaml", []),
    "sister-b-wide": ("configs/compare-sister-b.yaml", ["sae.d_sae=1024"]),
    "synthsaebench-4k": ("benchmarks/study/synthsaebench-4k.yaml", []),
}
LABELS = {
    "sister-a": "sister A",
    "halved": "sister A, roots half as frequent",
    "doubled": "sister A, roots twice as frequent",
    "cov20": "held out: coverage .2",
    "cov80": "held out: coverage .8",
    "flat": "held out: one level",
    "not-exclusive": "held out: not exclusive",
    "sister-b": "sister B",
    "sister-b-wide": "sister B, 1,024 latents",
    "synthsaebench-4k": "SynthSAEBench, a quarter",
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def commands() -> None:
    """Print the command of each search."""
    for name in MODELS:
        if name in SHORT:
            entries, seeds = SHORT[name]
            _print_command(name, "others", entries, HALF, seeds)
        else:
            _print_command(name, "l0", ATM)
            _print_command(name, "others", OTHERS, HALF)


def _print_command(
    name: str, prefix: str, entries: Entries, training: tuple[str, ...] = (), seeds: int = 2
) -> None:
    config, overrides = MODELS[name]
    settings = [f"architectures={json.dumps(entries)}", *overrides, *training]
    settings.append(f"output_path=runs/{prefix}-{name}")
    words = [word for setting in settings for word in ("--set", setting)]
    words += ["--longest", "1"] if training else []
    words += ["--seeds", str(seeds), "--jobs", "2"]
    print(shlex.join(["sae-lens-atm", "find-l0", config, *words]))


def true_l0s(config: str, overrides: list[str]) -> tuple[float, float]:
    """Return the mean number of active features, of all and of the most frequent ones.

    There are as many of these as latents.
    """
    run = load_comparison(ROOT / config, overrides).planned[0].run
    assert isinstance(run, SyntheticRun)
    model = synthetic_model(run, Path("runs"))
    counts = torch.zeros(model.cfg.num_features)
    with temporary_seed(SEED):
        for _ in range(SAMPLES // BATCH):
            counts += (model.sample_with_features(BATCH)[1].to_dense() != 0).sum(0)
    falling = (counts / SAMPLES).sort(descending=True).values
    return float(falling.sum()), float(falling[: run.runner.sae.d_sae].sum())


@app.command()
def collect(
    runs: Annotated[Path, typer.Argument(help="Folder with the searches.")],
    output: Annotated[Path, typer.Argument(help="JSON file to write.")],
) -> None:
    """Write the answers of the finished searches, and the true L0s."""
    content: dict[str, Any] = {}
    for name, (config, overrides) in MODELS.items():
        paths = [runs / f"{prefix}-{name}-l0/found_l0.json" for prefix in ("l0", "others")]
        found = [read_json(path)["entries"] for path in paths if path.exists()]
        answers = {n: FoundL0.model_validate(a) for entries in found for n, a in entries.items()}
        if not answers:
            continue
        of_all, of_frequent = true_l0s(config, overrides)
        content[name] = {
            "true_l0": round(of_all, 3),
            "true_l0_of_frequent": round(of_frequent, 3),
            "entries": {n: a.model_dump(exclude={"rounds"}) for n, a in answers.items()},
            "l0_by_length": {
                n: {f"{r.length:g}": round(r.l0, 3) for r in a.rounds} for n, a in answers.items()
            },
        }
        print(name, content[name]["true_l0"], {n: a.as_text[0] for n, a in answers.items()})
    output.write_text(to_json(content), encoding="utf-8")


def table(content: dict[str, Any]) -> str:
    """Return a row for each model: the true L0, and what is found with each architecture.

    An architecture that was searched on one model only has no column.
    """
    models = Counter(name for model in content.values() for name in model["entries"])
    names = [name for name, count in models.items() if count > 1]
    lines = [f"| | true L0 | {' | '.join(names)} |", "|---" + "|--:" * (len(names) + 1) + "|"]
    for name, model in content.items():
        cells = [_cell(model["entries"].get(n), model["true_l0"]) for n in names]
        lines.append(f"| {LABELS[name]} | {model['true_l0']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(answer: dict[str, Any] | None, true: float) -> str:
    if answer is None:
        return "-"
    found = answer["l0"]
    if answer["at_edge"]:
        return "no peak"
    text = f"{found:.2f} ({100 * (found / true - 1):+.0f}%)".replace("-", "\N{MINUS SIGN}")
    return f"**{text}**" if max(found / true, true / found) <= CLOSE else text


if __name__ == "__main__":
    app()
