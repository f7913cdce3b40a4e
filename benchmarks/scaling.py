"""Time and traffic of training steps in two processes, and estimates for wider SAEs.

    python benchmarks/scaling.py                       # two processes, one CPU thread each
    python benchmarks/scaling.py --json docs/scale/scaling.json

Three kinds of step alternate: one process with the whole batch, one process with half of it, and
two processes with half each. The results are medians of the time, and of the CPU time of a process.
The bytes that the two exchange are counted. They wait for each other a dozen times in a step. On a
machine with other work the time measures this waiting, and the CPU time measures the step.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from sae_lens import BatchTopKTrainingSAEConfig, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from sae_lens_atm import ATMTrainingSAEConfig
from sae_lens_atm.training.guard import BadBatchGuard, DeferredUpdates
from sae_lens_atm.training.parallel import AcrossRanks, RankExchange
from sae_lens_atm.training.preflight.memory import sae_size
from sae_lens_atm.training.ranks import Ranks
from sae_lens_atm.training.supervise import supervise

SHAPES = {"small": (256, 128, 1024, 16), "C": (1024, 512, 4096, 32)}  # batch, d_in, d_sae, k
RANKS = 2
GEMMA_27B = 4608  # d_in
WIDTHS = (2**14, 2**16, 2**18, 2**20)
# Assumed operations per second: 30% of the peak of an A100 in bfloat16.
OPERATIONS = 0.3 * 312e12
LINKS = {"25 GB/s": 25e9, "300 GB/s": 300e9}  # a network card of 200 Gbit/s; NVLink of an A100


def contenders(d_in: int, d_sae: int, k: int) -> dict[str, Any]:
    atm: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "k": k, "mask_warm_up_steps": 0}
    atm |= {"mask_end": 1.0, "schedule_steps": 10**6, "c_start": 0.5}
    return {
        "batchtopk": BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k),
        "atm, masks": ATMTrainingSAEConfig(**atm, parent_weight=0.0),
        "atm, masks and pressure": ATMTrainingSAEConfig(**atm, parent_start=0.0),
    }


def traffic(cfg: Any) -> int:
    """Return the bytes that a rank sums up with the others in a step, in float32, without ties."""
    weights, d_in, d_sae = cfg.d_in * cfg.d_sae, cfg.d_in, cfg.d_sae
    gradients = 2 * weights + d_in + d_sae
    found = gradients + d_sae  # counts of the latents that fired
    choices = 1
    threshold = 1
    bad_batch = 8  # whether a rank rejects the batch, a whole number of 64 bits
    if isinstance(cfg, ATMTrainingSAEConfig):
        found += 4 * d_sae + d_in + 1  # signals, energy, mean input, whether the batch is finite
        found += weights if cfg.parent_weight > 0 else 0
        choices += cfg.masked_weight > 0  # the masked pass chooses again
    digits = 3 * 2**11 * 8  # three histograms of whole numbers
    return 4 * (found + threshold) + bad_batch + choices * digits


def products(cfg: Any, batch: int) -> float:
    """Return the matrix products of a dense training step, averaged over the schedule.

    The unit is the product of a (batch, d_in) and a (d_in, d_sae) matrix. Dead latents are revived
    in every step.
    """
    count = 6.0  # encode and decode; four in the backward pass, one for the decoder's bias
    if hasattr(cfg, "aux_loss_coefficient"):
        count += 3  # decode dead latents, and the backward pass
    if isinstance(cfg, ATMTrainingSAEConfig):
        count += 1  # the contribution
        if cfg.mask_rate > 0:
            count += 3 * cfg.mask_end  # decode in the masked pass, and the backward pass
        if cfg.parent_weight > 0:
            rows = min(cfg.parent_rows, cfg.d_sae) / batch
            count += (1 + rows) * (1 - cfg.parent_start)
    return count


# --- timing --------------------------------------------------------------------------------------


def trainer_of(cfg: Any, batch: int) -> SAETrainer[Any, Any]:
    torch.manual_seed(0)
    trainer_cfg = SAETrainerConfig(
        total_training_samples=10**9,
        lr=3e-4,
        lr_end=3e-4,
        train_batch_size_samples=batch,
        dead_feature_window=10**6,
        feature_sampling_window=10**6,
        n_batches_for_norm_estimate=1,
    )
    sae = TrainingSAE[Any].from_dict(cfg.to_dict())
    return SAETrainer(cfg=trainer_cfg, sae=sae, data_provider=iter(()))


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return the time and the CPU time of a call."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def measured(cfg: Any, batch: int, ranks: Ranks, repeats: int) -> dict[str, float]:
    """Return the seconds of the three kinds of step, and the bytes that were exchanged."""
    whole = torch.randn(4, batch, cfg.d_in, generator=torch.Generator().manual_seed(1))
    share = [ranks.own_rows(x) for x in whole]
    one, half, several = (trainer_of(cfg, batch) for _ in range(3))
    counted: list[int] = []
    all_reduce = dist.all_reduce

    def counting(values: Tensor, *arguments: Any) -> None:
        counted.append(values.nbytes)
        all_reduce(values, *arguments)

    names = ("whole", "share", "together")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    context = AcrossRanks(ranks)
    guard = BadBatchGuard(several, 10, ranks.max_over_ranks)
    hooks = [RankExchange(several, ranks, context), guard, DeferredUpdates(several, context)]
    with supervise(several, hooks):
        for turn in range(repeats + 2):
            batches = whole[turn % 4], share[turn % 4]
            kinds: dict[str, Callable[[], object]] = {
                "whole": lambda x=batches[0]: one.step(x) if ranks.rank == 0 else None,
                "share": lambda x=batches[1]: half.step(x) if ranks.rank == 0 else None,
                "together": lambda x=batches[1]: several.step(x),
            }
            for name, work in kinds.items():
                dist.barrier()
                counted.clear()
                dist.all_reduce = counting if name == "together" else all_reduce
                took = seconds(work)
                dist.all_reduce = all_reduce
                if turn >= 2:
                    times[name].append(took)
                if name == "together":
                    exchanged = sum(counted)
    return {
        **{name: median(took for took, _ in found) for name, found in times.items()},
        **{f"{name}, CPU": median(cpu for _, cpu in found) for name, found in times.items()},
        "bytes": exchanged,
    }


def _process(rank: int, port: int, repeats: int, path: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    for shape, (batch, d_in, d_sae, k) in SHAPES.items():
        for name, cfg in contenders(d_in, d_sae, k).items():
            result = measured(cfg, batch, Ranks(rank, RANKS), repeats)
            found[f"{shape}, {name}"] = {**result, "expected_bytes": traffic(cfg)}
    if rank == 0:
        Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()


# --- tables --------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """Return ratios to a step of one process with the whole batch."""
    lines = [
        "| | two, half each: time | CPU time of each | one, half: CPU time | MB exchanged "
        "| formula |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, f in found.items():
        ratio = f["together"] / f["whole"]
        cpu = [f[f"{n}, CPU"] / f["whole, CPU"] for n in ("together", "share")]
        megabytes = [f[key] / 1e6 for key in ("bytes", "expected_bytes")]
        cells = " | ".join(f"{value:.2f}" for value in (ratio, *cpu, *megabytes))
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def sharded(found: dict[str, Any]) -> str:
    """Return the traffic with all latents on each rank, and with a share of the latents on each."""
    lines = ["| | MB exchanged | two decoded batches, MB | ratio |", "|---|--:|--:|--:|"]
    for shape, (batch, d_in, _, _) in SHAPES.items():
        exchanged = found[f"{shape}, atm, masks and pressure"]["bytes"] / 1e6
        decoded = 2 * 4 * batch * d_in / 1e6
        lines.append(f"| {shape} | {exchanged:.2f} | {decoded:.2f} | {exchanged / decoded:.1f} |")
    return "\n".join(lines)


def carried(_: Any = None, batch: int = 4096) -> str:
    """Return estimates at Gemma-2-27b's width, for each rank. The work is the whole batch's."""
    gib = 2**30
    lines = [
        "| latents | state, GiB | gradients and inputs, GiB | PFLOP a step | s on one A100 | "
        + "GB exchanged a step | "
        + " | ".join(f"s at {name}" for name in LINKS)
        + " |",
        "|--:|--:|--:|--:|--:|--:|" + "--:|" * len(LINKS),
    ]
    for d_sae in WIDTHS:
        cfg = ATMTrainingSAEConfig(d_in=GEMMA_27B, d_sae=d_sae, k=64)
        size = sae_size(cfg)
        passing = size.parameters + 4 * cfg.d_in * d_sae
        work = products(cfg, batch) * 2 * batch * cfg.d_in * d_sae
        exchanged = traffic(cfg)
        links = " | ".join(f"{2 * exchanged / rate:.2f}" for rate in LINKS.values())
        lines.append(
            f"| {d_sae:,} | {size.resident / gib:.1f} | {passing / gib:.1f} | {work / 1e15:.2f} | "
            f"{work / OPERATIONS:.2f} | {exchanged / 1e9:.1f} | {links} |"
        )
    return "\n".join(lines)


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Of each kind of step.")] = 15,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the figures.")] = None,
) -> None:
    """Time steps of one and of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = json_file or Path("scaling.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    spawn(_process, (port, repeats, str(path)), nprocs=RANKS)
    found = json.loads(path.read_text(encoding="utf-8"))
    print(table(found), sharded(found), carried(), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
