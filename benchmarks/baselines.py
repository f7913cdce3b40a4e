"""Time of a training step, and of a saved SAE, for ATM and each architecture of `baselines`.

    python benchmarks/baselines.py                    # shape C, on one CPU thread
    python benchmarks/baselines.py --only ortsae --only tree_sae

The architectures take turns in one process. Other work of the machine then slows all of them
equally. The script prints median times, divided by those of SAELens' `batchtopk`. The range is the
first and third quartile of the ratios of single turns. A saved SAE encodes and decodes a batch.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sae_lens import SAE, TrainingSAE, TrainingSAEConfig
from step_time import BASE, BATCHES, SHAPES, Contender, Shape, make_batches, make_trainer, timed

from sae_lens_atm.baselines import BASELINES, training_class

RESULT = Path(__file__).parent.parent / "docs/performance/baselines.json"
WARM_UP = 5
Measured = dict[str, dict[str, dict[str, float]]]
"""For each architecture the times of a step and of the saved SAE."""


def config(name: str, shape: Shape) -> TrainingSAEConfig:
    """Return the default configuration of an architecture, at a shape."""
    registered = training_class(name)
    assert registered is not None, name
    values: dict[str, Any] = {"d_in": shape.d_in, "d_sae": shape.d_sae, "k": shape.k}
    known = {field.name for field in fields(registered[1])}
    return registered[1](**{k: v for k, v in values.items() if k in known})


def measure(shape: Shape, names: list[str], repeats: int) -> Measured:
    """Return the times of a step and of the saved SAE, relative to SAELens' `batchtopk`."""
    configs = {name: config(name, shape) for name in (BASE, *names)}
    trainers = {
        name: make_trainer(Contender(cfg), shape, "cpu", autocast=False, compiled=False)
        for name, cfg in configs.items()
    }
    batches = make_batches(shape, "cpu")

    def step(name: str, turn: int) -> None:
        trainers[name].step(batches[turn % BATCHES])
        trainers[name].n_training_steps += 1

    steps = in_turns(step, list(trainers), repeats)
    saved = {name: as_saved(trainer.sae) for name, trainer in trainers.items()}

    @torch.no_grad()
    def infer(name: str, turn: int) -> None:
        saved[name](batches[turn % BATCHES])

    inference = in_turns(infer, list(trainers), repeats)
    return {
        name: {"step": steps[name], "inference": inference[name]} for name in names if name != BASE
    }


def as_saved(sae: TrainingSAE[Any]) -> SAE[Any]:
    """Return the SAE as users load it."""
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return SAE[Any].load_from_disk(folder)


def in_turns(
    work: Callable[[str, int], None], names: list[str], repeats: int
) -> dict[str, dict[str, float]]:
    """Return the time of the work with each architecture, relative to `batchtopk`."""
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(WARM_UP + repeats):
        for name in names:
            took = timed(lambda n=name, t=turn: work(n, t), "cpu")
            if turn >= WARM_UP:
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
    lines = ["| | training step | quartiles | saved SAE | quartiles |", "|---" + "|--:" * 4 + "|"]
    for name, parts in found["times"].items():
        cells = [
            cell
            for part in (parts["step"], parts["inference"])
            for cell in (f"{part['time']:.2f}", f"{part['low']:.2f} to {part['high']:.2f}")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(
    shape: str = "C",
    repeats: Annotated[int, typer.Option(min=3)] = 30,
    only: Annotated[list[str] | None, typer.Option(help="Names to measure.")] = None,
    write: bool = False,
) -> None:
    """Measure times of a step and of a saved SAE, as ratios to SAELens' batchtopk."""
    torch.set_num_threads(1)
    times = measure(SHAPES[shape], list(only or ("atm", *BASELINES)), repeats)
    found = {"shape": shape, "repeats": repeats, "torch": torch.__version__, "times": times}
    print(table(found))
    if write:
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
