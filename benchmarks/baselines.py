"""Time of a training step of each architecture of `sae_lens_atm.baselines`.

    python benchmarks/baselines.py                    # shape C, on one CPU thread
    python benchmarks/baselines.py --only ortsae --only tree_sae

The architectures take turns in one process. Other work of the machine then slows all of them
equally. The script prints the median step time, divided by that of SAELens' `batchtopk`. The range
is the first and third quartile of the ratios of single turns.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sae_lens import TrainingSAEConfig
from step_time import BASE, BATCHES, SHAPES, Contender, Shape, make_batches, make_trainer, timed

from sae_lens_atm.baselines import BASELINES, training_class

RESULT = Path(__file__).parent.parent / "docs/performance/baselines.json"
WARM_UP = 5


def config(name: str, shape: Shape) -> TrainingSAEConfig:
    """Return the default configuration of an architecture, at a shape."""
    registered = training_class(name)
    assert registered is not None, name
    values: dict[str, Any] = {"d_in": shape.d_in, "d_sae": shape.d_sae, "k": shape.k}
    known = {field.name for field in fields(registered[1])}
    return registered[1](**{k: v for k, v in values.items() if k in known})


def measure(shape: Shape, names: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """Return the time of a step of each architecture, relative to SAELens' `batchtopk`."""
    configs = {name: config(name, shape) for name in (BASE, *names)}
    trainers = {
        name: make_trainer(Contender(cfg), shape, "cpu", autocast=False, compiled=False)
        for name, cfg in configs.items()
    }
    batches = make_batches(shape, "cpu")
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for repeat in range(WARM_UP + repeats):
        for name, trainer in trainers.items():
            took = timed(lambda t=trainer, r=repeat: t.step(batches[r % BATCHES]), "cpu")
            trainer.n_training_steps += 1
            if repeat >= WARM_UP:
                times[name].append(took)
    base = torch.tensor(times[BASE])
    found = {}
    for name in names:
        own = torch.tensor(times[name])
        low, high = (own / base).quantile(torch.tensor([0.25, 0.75])).tolist()
        found[name] = {"time": float(own.median() / base.median()), "low": low, "high": high}
    return found


def table(found: dict[str, Any]) -> str:
    """Format the figures as a Markdown table."""
    rows = [
        f"| {name} | {row['time']:.2f} | {row['low']:.2f} to {row['high']:.2f} |"
        for name, row in found["steps"].items()
    ]
    return "\n".join(["| | time | quartiles |", "|---|--:|--:|", *rows])


def main(
    shape: str = "C",
    repeats: Annotated[int, typer.Option(min=3)] = 30,
    only: Annotated[list[str] | None, typer.Option(help="Names to measure.")] = None,
    write: bool = False,
) -> None:
    """Measure the time of a step, as a ratio to SAELens' batchtopk."""
    torch.set_num_threads(1)
    steps = measure(SHAPES[shape], list(only or BASELINES), repeats)
    found = {"shape": shape, "repeats": repeats, "torch": torch.__version__, "steps": steps}
    print(table(found))
    if write:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
