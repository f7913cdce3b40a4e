"""The processes of one training, and the exchanges between them."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

from sae_lens_atm.errors import RankLostError, SettingsError, one_line
from sae_lens_atm.method.selection import candidates
from sae_lens_atm.torchrun import rank, size
from sae_lens_atm.training.run_file import Run, SyntheticRun

_TIMEOUT = timedelta(minutes=30)  # all ranks wait while one evaluates or saves
_DIGIT_BITS = 11  # bits of a floating-point number in one histogram


_ONE_PROCESS = {
    "archetypal": "it takes samples into its dictionary",
    "itda": "it takes samples into its dictionary",
    "lista_matryoshka": "its thresholds and frequencies are counted on samples",
    "tree_sae": "its tree is built from counts on samples",
}
"""Architectures that cannot be trained in several processes, and why."""


def check_shares(run: Run) -> None:
    """Check that architecture, batch and GPUs suit the number of processes.

    Raises:
        SettingsError: they cannot. The message names the setting.
    """
    cfg = run.runner
    name = "batch_size" if isinstance(run, SyntheticRun) else "train_batch_size_tokens"
    batch = getattr(cfg, name)
    if batch % size():
        raise SettingsError(
            f"{name} must be a multiple of {size()}, the number of processes, got {batch}"
        )
    if size() > 1 and getattr(cfg, "use_cached_activations", False):
        # SAELens stores the position in the cache for one process only.
        raise SettingsError("use_cached_activations must be False with several processes, got True")
    architecture = cfg.sae.architecture()
    if size() > 1 and architecture in _ONE_PROCESS:
        raise SettingsError(
            f"sae.architecture must not be {architecture!r} with several processes: "
            f"{_ONE_PROCESS[architecture]}, and each process has others. Train it in one process"
        )
    for where, device in gpu_settings(run).items():
        if size() > 1 and ":" in device:
            raise SettingsError(f"{where} must be 'cuda' with several processes, got {device!r}")


def gpu_settings(run: Run) -> dict[str, str]:
    """Return the settings of a run that name a GPU, and their values."""
    found = {"sae.device": run.runner.sae.device}
    for name in ("device", "llm_device", "act_store_device"):
        found[name] = getattr(run.runner, name, None) or ""
    return {name: device for name, device in found.items() if device.startswith("cuda")}


class Ranks(NamedTuple):
    """This process's place among the processes of a training, and its exchanges with them.

    A method whose name ends in an underscore changes its argument.

    Raises:
        RankLostError: from every exchange, if another process has ended.
    """

    rank: int
    size: int

    def reduce_(self, values: Tensor, operation: Any = ReduceOp.SUM) -> Tensor:
        """Replace each value by the sum (or another reduction) over the ranks."""
        whole = values.contiguous()
        with _lost_ranks_noticed():
            dist.all_reduce(whole, operation)
        return values if whole is values else values.copy_(whole)

    def mean_(self, values: Tensor) -> Tensor:
        """Replace each value by its mean over the ranks."""
        return self.reduce_(values).div_(self.size)

    def broadcast_(self, values: Tensor) -> None:
        """Replace the values by rank 0's."""
        with _lost_ranks_noticed():
            dist.broadcast(values, 0)

    def broadcast_object(self, value: Any) -> Any:
        """Return rank 0's value. Its tensors must be on the CPU."""
        values = [value]
        with _lost_ranks_noticed():
            dist.broadcast_object_list(values)
        return values[0]

    def max_over_ranks(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        return int(self.reduce_(torch.tensor(number), ReduceOp.MAX))

    def gather_rows(self, batch: Tensor) -> Tensor:
        """Return the rows of all ranks, in the order of the ranks."""
        parts = [torch.empty_like(batch) for _ in range(self.size)]
        with _lost_ranks_noticed():
            dist.all_gather(parts, batch.contiguous())
        return torch.cat(parts)

    def own_rows(self, batch: Tensor) -> Tensor:
        """Return this rank's rows of a whole batch."""
        return batch.chunk(self.size)[self.rank]

    def wait_for_others(self) -> None:
        """Wait until all ranks are here, unless one has ended."""
        try:
            self.max_over_ranks(0)
        except RankLostError:
            return


@contextmanager
def _lost_ranks_noticed() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:
        where, bracket, reason = one_line(error).partition("] ")
        reason = (reason if bracket else where)[:80]
        raise RankLostError(f"another process of this training has ended ({reason})") from error


@contextmanager
def joined(run: Run) -> Generator[Ranks | None]:
    """Join the other processes of this training, each on its own GPU if the run uses GPUs.

    Yields None if there are no other processes.
    """
    if size() == 1:
        yield None
        return
    devices, local = gpu_settings(run), int(os.environ.get("LOCAL_RANK", rank()))
    if devices and local >= torch.cuda.device_count():
        raise SettingsError(
            f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}. "
            "Start as many processes as there are GPUs"
        )
    for name in devices:
        holder = run.runner.sae if name == "sae.device" else run.runner
        setattr(holder, name.removeprefix("sae."), f"cuda:{local}")
    if devices:
        torch.cuda.set_device(local)
    if rank() > 0:
        os.environ["WANDB_MODE"] = "disabled"  # all ranks evaluate, one logs
    dist.init_process_group("cpu:gloo,cuda:nccl" if devices else "gloo", timeout=_TIMEOUT)
    yield Ranks(rank(), size())
    dist.destroy_process_group()  # not after an error: it may wait for ranks that have ended


def largest_across_ranks(values: Tensor, count: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Return which of this rank's values are among the `count` largest positive ones of all ranks.

    The smallest chosen value is found digit by digit, from histograms summed over the ranks: the
    bits of positive floating-point numbers are ordered as the numbers are. No activation is
    exchanged, and the traffic depends neither on the batch nor on the number of latents.

    Args:
        values: this rank's values, of any shape.
        count: number of values to choose on all ranks together.
        ranks: the processes.

    Returns:
        Indices into ``values.flatten()``, ascending, and the values there, as `largest_positive`.
    """
    flat = values.flatten()
    places = candidates(flat, count)
    found = flat[places]
    if found.dtype == torch.float64:
        bits, digits = found.view(torch.int64), 6
    else:
        bits, digits = found.float().view(torch.int32).long(), 3
    shifts = range((digits - 1) * _DIGIT_BITS, -1, -_DIGIT_BITS)
    border, wanted, ties, inside = 0, count, 0, bits
    for shift in shifts:
        digit = (inside >> shift) & (2**_DIGIT_BITS - 1)
        counts = ranks.reduce_(torch.bincount(digit, minlength=2**_DIGIT_BITS))
        at_least = counts.flip(0).cumsum(0).flip(0)
        if int(at_least[0]) <= wanted and shift == shifts[0]:
            return places, found
        here = int((at_least >= wanted).nonzero().amax())
        ties = int(counts[here])
        wanted -= int(at_least[here]) - ties
        border = (border << _DIGIT_BITS) | here
        inside = inside[digit == here]
    kept = bits >= border
    if ties > wanted:  # of equal values at the border, keep the first ranks'
        each = torch.zeros(ranks.size, dtype=torch.int64, device=bits.device)
        each[ranks.rank] = inside.numel()
        before = int(ranks.reduce_(each)[: ranks.rank].sum())
        own = max(wanted - before, 0)
        kept[(bits == border).nonzero().squeeze(1)[own:]] = False
    return places[kept], found[kept]
