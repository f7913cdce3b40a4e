"""Time and peak memory of a training step: ATM beside SAELens' architectures, in one process.

    python benchmarks/step_time.py                      # shape C, on one CPU thread
    python benchmarks/step_time.py --shape G --device cuda
    python benchmarks/step_time.py --grow               # vary each dimension

The step is SAELens' `SAETrainer.step` (forward, backward, clipping, Adam) on a batch in memory. The
architectures take turns, so that other work of the machine slows all of them equally. The script
prints medians relative to SAELens' `batchtopk`. The floor is the time of five matrix products and
one pass over Adam's state, at the speed measured in the same run.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from sae_lens_atm import ATMTrainingSAEConfig

BASE = "batchtopk"
BATCHES = 4  # used in turn, so that few latents are dead
_PEAK = "--peak-of"  # with this option the file runs itself in a new process
LONG = 10**6  # steps of the schedule, so long that its phases do not change while timed


@dataclass(frozen=True)
class Shape:
    batch: int
    d_in: int
    d_sae: int
    k: int


SHAPES = {
    "C": Shape(1024, 512, 4096, 32),
    "A": Shape(1024, 64, 256, 4),
    "G": Shape(4096, 2304, 16384, 64),
    "G64k": Shape(4096, 2304, 65536, 64),
}


@dataclass(frozen=True)
class Contender:
    """A configuration, and the share of its schedule at which it is timed."""

    cfg: TrainingSAEConfig
    at: float = 0.0


def contenders(shape: Shape, *, only_atm: bool = False) -> dict[str, Contender]:
    size: dict[str, Any] = {"d_in": shape.d_in, "d_sae": shape.d_sae}
    widths = [shape.d_sae // 16, shape.d_sae // 4, shape.d_sae]
    theirs = {
        "topk": TopKTrainingSAEConfig(**size, k=shape.k),
        BASE: BatchTopKTrainingSAEConfig(**size, k=shape.k),
        "jumprelu": JumpReLUTrainingSAEConfig(**size),
        "matryoshka_batchtopk": MatryoshkaBatchTopKTrainingSAEConfig(
            **size, k=shape.k, matryoshka_widths=widths
        ),
        "standard": StandardTrainingSAEConfig(**size),
    }
    found = {name: Contender(cfg) for name, cfg in theirs.items() if name == BASE or not only_atm}
    atm = ATMTrainingSAEConfig(**size, k=shape.k, schedule_steps=LONG)
    unpressed = replace(atm, parent_weight=0.0)
    # Half way through the phase with masks.
    middle = atm.mask_end / 2
    found |= {
        "atm, masks": Contender(atm, atm.parent_start / 2),
        "atm, masks and pressure": Contender(atm, (atm.parent_start + atm.mask_end) / 2),
        "atm, pressure": Contender(atm, (atm.mask_end + 1) / 2),
        "atm, neither": Contender(replace(unpressed, mask_rate=0.0), middle),
    }
    if not only_atm:
        found |= {
            "atm, masks, dense": Contender(replace(unpressed, kernels="dense"), middle),
            "atm, paper preset": Contender(
                ATMTrainingSAEConfig.paper(**size, schedule_steps=LONG), middle
            ),
        }
    return found


def default_schedule(figures: dict[str, float]) -> float:
    """Return the mean over the default's schedule, from its phases."""
    cfg = ATMTrainingSAEConfig(d_in=1, d_sae=1, k=1)
    start, end = cfg.parent_start, cfg.mask_end
    assert 0 <= start <= end <= 1, "the phases below are those of the present defaults"
    return (
        start * figures["atm, masks"]
        + (end - start) * figures["atm, masks and pressure"]
        + (1 - end) * figures["atm, pressure"]
    )


# --- what is timed -------------------------------------------------------------------------------


def make_batches(shape: Shape, device: str) -> list[Tensor]:
    """Make batches of sparse sums of random directions, with uneven frequencies."""
    generator = torch.Generator().manual_seed(0)
    features = shape.d_sae // 2
    directions = torch.nn.functional.normalize(
        torch.randn(features, shape.d_in, generator=generator), dim=1
    )
    often = 0.5 / torch.arange(1, features + 1) ** 0.5
    batches = []
    for _ in range(BATCHES):
        draw = torch.rand(shape.batch, features, generator=generator)
        batches.append((((draw < often) * 1.0) @ directions).to(device))
    return batches


def make_trainer(
    contender: Contender, shape: Shape, device: str, autocast: bool, compiled: bool
) -> SAETrainer[Any, Any]:
    torch.manual_seed(0)
    sae = TrainingSAE[Any].from_dict({**contender.cfg.to_dict(), "device": device})
    if hasattr(sae, "tracker"):
        sae.tracker.steps.fill_(int(contender.at * LONG))
    if compiled:
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)
    cfg = SAETrainerConfig(
        total_training_samples=LONG * shape.batch,
        train_batch_size_samples=shape.batch,
        lr=1e-3,
        lr_end=1e-3,
        device=device,
        autocast=autocast,
    )
    return SAETrainer(cfg, sae, iter([]))


def timed(action: Callable[[], Any], device: str) -> float:
    """Return the milliseconds that an action takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def median(values: list[float]) -> float:
    return float(torch.tensor(values).quantile(0.5))


def step_times(
    shape: Shape,
    named: dict[str, Contender],
    device: str,
    *,
    repeats: int,
    warm_up: int,
    autocast: bool = False,
    compiled: bool = False,
) -> dict[str, float]:
    """Return milliseconds a step, the median over repeats. The architectures take turns."""
    batches = make_batches(shape, device)
    trainers = {
        name: make_trainer(one, shape, device, autocast, compiled) for name, one in named.items()
    }
    times: dict[str, list[float]] = {name: [] for name in named}
    for repeat in range(warm_up + repeats):
        for name, trainer in trainers.items():
            took = timed(lambda t=trainer, r=repeat: t.step(batches[r % BATCHES]), device)
            trainer.n_training_steps += 1
            if repeat >= warm_up:
                times[name].append(took)
    return {name: median(values) for name, values in times.items()}


def bookkeeping_share(shape: Shape, device: str, repeats: int) -> float:
    """Return the share of a step with masks that threshold, mask and statistics take."""
    batches = make_batches(shape, device)
    one = contenders(shape)["atm, masks"]
    trainer = make_trainer(one, shape, device, autocast=False, compiled=False)
    sae = trainer.sae
    spent: list[float] = [0.0]

    def counted(action: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            result: list[Any] = []
            spent[-1] += timed(lambda: result.append(action(*args)), device)
            return result[0]

        return wrapper

    sae.draw_mask, sae.update_averages = counted(sae.draw_mask), counted(sae.update_averages)
    full_pass = sae.full_pass

    def with_counted_statistics(step_input: Any) -> Any:
        result = full_pass(step_input)
        return replace(result, statistics=counted(result.statistics))

    sae.full_pass = with_counted_statistics
    shares = []
    for repeat in range(repeats + 5):
        spent.append(0.0)
        whole = timed(lambda r=repeat: trainer.step(batches[r % BATCHES]), device)
        shares.append(spent[-1] / whole)
    return median(shares[5:])


def floor(shape: Shape, device: str, repeats: int) -> dict[str, float]:
    """Return the milliseconds of the work that every dense step needs, at measured rates."""
    x = torch.randn(shape.batch, shape.d_in, device=device)
    weights = torch.randn(shape.d_in, shape.d_sae, device=device)
    state = torch.zeros(7, 2 * shape.d_in * shape.d_sae, device=device)

    def through() -> None:  # four tensors read and three written, as Adam does
        torch.add(state[0], state[1], out=state[4])
        torch.add(state[2], state[3], out=state[5])
        state[6].zero_()

    product = median([timed(lambda: x @ weights, device) for _ in range(repeats + 2)][2:])
    adam = median([timed(through, device) for _ in range(repeats + 2)][2:])
    flops = 2 * shape.batch * shape.d_in * shape.d_sae
    return {
        "product": product,
        "adam": adam,
        "total": 5 * product + adam,
        "gflops": flops / product / 1e6,
    }


def peak_memory(named: dict[str, Contender], shape: Shape, device: str) -> dict[str, float]:
    """Return the peak memory of some steps in MiB, each measured in a new process."""
    found = {}
    for name in named:
        order = json.dumps([name, asdict(shape), device, torch.get_num_threads()])
        command = [sys.executable, __file__, _PEAK, order]
        answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        found[name] = float(answer.stdout.split()[-1])
    return found


def _own_peak(name: str, shape: Shape, device: str, threads: int) -> float:
    torch.set_num_threads(threads)
    batches = make_batches(shape, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = _high_water()
    trainer = make_trainer(contenders(shape)[name], shape, device, autocast=False, compiled=False)
    for repeat in range(6):
        trainer.step(batches[repeat % BATCHES])
        trainer.n_training_steps += 1
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _high_water() - before


def _high_water() -> float:
    """Return the peak memory of this process in MiB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    # Unlike getrusage, VmHWM does not include the parent process.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


# --- what is shown -------------------------------------------------------------------------------


def measure(
    shape: Shape, device: str, repeats: int, *, autocast: bool, compiled: bool, memory: bool
) -> dict[str, Any]:
    named = contenders(shape)
    peaks = peak_memory(named, shape, device) if memory else {}
    times = step_times(
        shape, named, device, repeats=repeats, warm_up=8, autocast=autocast, compiled=compiled
    )
    bounds = floor(shape, device, repeats)
    times["atm, default schedule"] = default_schedule(times)
    if peaks:
        peaks["atm, default schedule"] = max(v for k, v in peaks.items() if k in _PHASES)
    on_gpu = device == "cuda"
    return {
        "shape": asdict(shape),
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"CPU, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
        "repeats": repeats,
        "autocast": autocast,
        "compiled": compiled,
        "steps": {
            name: {
                "time": took / times[BASE],
                "memory": peaks[name] / peaks[BASE] if peaks else None,
                "of_floor": bounds["total"] / took,
                # The CPU may be shared, so that only ratios are kept.
                "ms": took if on_gpu else None,
            }
            for name, took in times.items()
        },
        "floor": bounds["total"] / times[BASE],
        "one_product": bounds["product"] / times[BASE],
        "adam": bounds["adam"] / times[BASE],
        "bookkeeping": bookkeeping_share(shape, device, repeats),
    }


_PHASES = ("atm, masks", "atm, masks and pressure", "atm, pressure")


def growth(shape: Shape, device: str, repeats: int) -> dict[str, Any]:
    """Time the phases of ATM against `batchtopk` of the same shape, one dimension changed at a
    time."""
    rows = []
    variations: dict[str, list[int]] = {
        "batch": [shape.batch // 4, shape.batch, shape.batch * 4],
        "d_in": [shape.d_in // 4, shape.d_in, shape.d_in * 2],
        "d_sae": [shape.d_sae // 4, shape.d_sae, shape.d_sae * 4],
        "k": [shape.k // 4, shape.k, shape.k * 4, shape.k * 8],
    }
    for field, values in variations.items():
        for value in values:
            one = replace(shape, **{field: value})
            named = contenders(one, only_atm=True)
            times = step_times(one, named, device, repeats=repeats, warm_up=4)
            ratios = {n: t / times[BASE] for n, t in times.items() if n != BASE}
            rows.append({"dimension": field, "value": value, "ratios": ratios})
            print(field, value, {n: round(r, 2) for n, r in ratios.items()}, file=sys.stderr)
    return {"shape": asdict(shape), "rows": rows}


def table(found: dict[str, Any]) -> str:
    """Format the figures of `measure` as a Markdown table."""
    lines = ["| | time | peak memory | of the floor |", "|---|--:|--:|--:|"]
    for name, row in found["steps"].items():
        memory = "" if row["memory"] is None else f"{row['memory']:.2f}"
        ms = "" if row["ms"] is None else f" ({row['ms']:.1f} ms)"
        lines.append(f"| {name} | {row['time']:.2f}{ms} | {memory} | {row['of_floor']:.2f} |")
    return "\n".join(lines)


def growth_table(found: dict[str, Any]) -> str:
    """Format the figures of `growth` as a Markdown table."""
    names = list(found["rows"][0]["ratios"])
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for row in found["rows"]:
        cells = " | ".join(f"{row['ratios'][name]:.2f}" for name in names)
        lines.append(f"| {row['dimension']} {row['value']} | {cells} |")
    return "\n".join(lines)


def sentence(found: dict[str, Any]) -> str:
    return (
        f"{BASE} = 1.00. The floor is {found['floor']:.2f}, of which Adam {found['adam']:.2f}; one "
        f"product of matrices {found['one_product']:.2f}. Threshold, mask and statistics take "
        f"{found['bookkeeping']:.1%} of a step with masks."
    )


def main(
    shape: Literal["C", "A", "G", "G64k"] = "C",
    device: Literal["cpu", "cuda"] = "cpu",
    repeats: Annotated[int, typer.Option(min=3)] = 30,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    autocast: bool = False,
    compiled: Annotated[bool, typer.Option("--compile")] = False,
    memory: bool = True,
    grow: Annotated[
        bool, typer.Option("--grow", help="Vary one dimension at a time instead.")
    ] = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
) -> None:
    """Measure time and memory of a training step, as ratios to SAELens' batchtopk."""
    torch.set_num_threads(threads)
    if grow:
        found = growth(SHAPES[shape], device, repeats)
        shown = [growth_table(found)]
    else:
        found = measure(
            SHAPES[shape], device, repeats, autocast=autocast, compiled=compiled, memory=memory
        )
        shown = [table(found), sentence(found)]
    print(f"{found['shape']}\n", *shown, sep="\n\n")
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [_PEAK]:
        name, shape, device, threads = json.loads(sys.argv[2])
        print(_own_peak(name, Shape(**shape), device, threads))
    else:
        typer.run(main)
