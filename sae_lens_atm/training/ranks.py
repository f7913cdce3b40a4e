"""The processes of one training, and what they tell each other."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

from sae_lens_atm.errors import RankLostError, SettingsError
from sae_lens_atm.method.selection import candidates
from sae_lens_atm.training.run_file import Run, SyntheticRun

_PATIENCE = timedelta(minutes=30)  # an evaluation or a checkpoint of one rank keeps all waiting
_DIGIT = 11  # bits of a floating-point number that are looked at in one exchange


def size() -> int:
    """The number of processes that this training is started in, by torchrun or the like."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """Which of them this is; the first writes."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def speaks() -> bool:
    """Whether this is the process of its machine that tells what all would tell."""
    return size() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"


def check_shares(run: Run) -> None:
    """Check that the processes can share out a batch and the GPUs.

    Raises:
        SettingsError: naming what does not go into what.
    """
    cfg = run.runner
    name = "batch_size" if isinstance(run, SyntheticRun) else "train_batch_size_tokens"
    batch = getattr(cfg, name)
    if batch % size():
        raise SettingsError(
            f"{name} is {batch}: allowed is a multiple of {size()}, the number of processes"
        )
    if size() > 1 and getattr(cfg, "use_cached_activations", False):
        # SAELens keeps the row that was reached in one process only.
        raise SettingsError("use_cached_activations is True: allowed is False in several processes")
    for where, device in gpu_settings(run).items():
        if size() > 1 and ":" in device:
            raise SettingsError(f"{where} is {device!r}: allowed is 'cuda', one for each process")


def gpu_settings(run: Run) -> dict[str, str]:
    """The settings that name a GPU."""
    found = {"sae.device": run.runner.sae.device}
    for name in ("device", "llm_device", "act_store_device"):
        found[name] = getattr(run.runner, name, None) or ""
    return {name: device for name, device in found.items() if device.startswith("cuda")}


class Ranks(NamedTuple):
    """This process among those of a training."""

    rank: int
    size: int

    def total(self, values: Tensor, operation: Any = ReduceOp.SUM) -> Tensor:
        """Make each value the sum (or another operation) of that of all ranks."""
        whole = values.contiguous()
        with _noticing():
            dist.all_reduce(whole, operation)
        return values if whole is values else values.copy_(whole)

    def mean(self, values: Tensor) -> Tensor:
        """Make each value the mean of that of all ranks."""
        return self.total(values).div_(self.size)

    def highest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return int(self.total(torch.tensor(number), ReduceOp.MAX))

    def rows_of_all(self, batch: Tensor) -> Tensor:
        """The whole batch, of which each rank has some rows."""
        parts = [torch.empty_like(batch) for _ in range(self.size)]
        with _noticing():
            dist.all_gather(parts, batch.contiguous())
        return torch.cat(parts)

    def own_rows(self, batch: Tensor) -> Tensor:
        """This rank's rows of a whole batch."""
        return batch.chunk(self.size)[self.rank]

    def of_first(self, thing: Any) -> Any:
        """What the first rank has for this; its tensors must be a CPU's."""
        told = [thing]
        with _noticing():
            dist.broadcast_object_list(told)
        return told[0]

    def take(self, values: Tensor) -> None:
        """Overwrite values with the first rank's."""
        with _noticing():
            dist.broadcast(values, 0)

    def wait(self) -> None:
        """Wait for the others, if they are there."""
        try:
            self.highest(0)
        except RankLostError:
            return


@contextmanager
def _noticing() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:
        where, bracket, reason = " ".join(str(error).split()).partition("] ")
        reason = (reason if bracket else where)[:80]
        raise RankLostError(f"another process of this training is gone ({reason})") from error


@contextmanager
def joined(run: Run) -> Generator[Ranks | None]:
    """This process among the others of the training, each on a GPU of its own if on any; None if
    there are no others."""
    if size() == 1:
        yield None
        return
    devices, local = gpu_settings(run), int(os.environ.get("LOCAL_RANK", rank()))
    if devices and local >= torch.cuda.device_count():
        raise SettingsError(
            f"process {local} of this machine finds no GPU: there are {torch.cuda.device_count()}"
        )
    for name in devices:
        holder = run.runner.sae if name == "sae.device" else run.runner
        setattr(holder, name.removeprefix("sae."), f"cuda:{local}")
    if devices:
        torch.cuda.set_device(local)
    if rank() > 0:
        os.environ["WANDB_MODE"] = "disabled"  # all evaluate alike, one logs
    dist.init_process_group("cpu:gloo,cuda:nccl" if devices else "gloo", timeout=_PATIENCE)
    yield Ranks(rank(), size())
    dist.destroy_process_group()  # after an error it may wait for those who are gone


def largest_of_all(values: Tensor, count: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """`largest_positive` among the values of all ranks: which of this rank's are chosen.

    The smallest chosen one is found digit by digit: positive floating-point numbers are ordered as
    their bits are, and a histogram of a digit tells in which of its values the border lies. So no
    values travel, and what does is the same for any batch and any number of latents.
    """
    flat = values.flatten()
    places = candidates(flat, count)
    found = flat[places]
    if found.dtype == torch.float64:
        bits, shifts = found.view(torch.int64), range(5 * _DIGIT, -1, -_DIGIT)
    else:
        bits, shifts = found.float().view(torch.int32).long(), range(2 * _DIGIT, -1, -_DIGIT)
    border, wanted, ties, inside = 0, count, 0, bits
    for shift in shifts:
        digit = (inside >> shift) & (2**_DIGIT - 1)
        counts = ranks.total(torch.bincount(digit, minlength=2**_DIGIT))
        at_least = counts.flip(0).cumsum(0).flip(0)
        if int(at_least[0]) <= wanted and shift == shifts[0]:
            return places, found
        here = int((at_least >= wanted).nonzero().amax())
        ties = int(counts[here])
        wanted -= int(at_least[here]) - ties
        border = (border << _DIGIT) | here
        inside = inside[digit == here]
    kept = bits >= border
    if ties > wanted:  # of equal values at the border the first ranks' are kept
        each = torch.zeros(ranks.size, dtype=torch.int64, device=bits.device)
        each[ranks.rank] = inside.numel()
        before = int(ranks.total(each)[: ranks.rank].sum())
        own = max(wanted - before, 0)
        kept[(bits == border).nonzero().squeeze(1)[own:]] = False
    return places[kept], found[kept]
