"""Estimate the time of a run: time a few real steps on the run's device, and scale them up."""

import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import LoggingConfig, SAETrainer, TrainingSAE
from sae_lens.util import temporary_seed

from sae_lens_atm.errors import one_line
from sae_lens_atm.files import write_manifest
from sae_lens_atm.sae.atm_sae import ATMTrainingSAE
from sae_lens_atm.training.guard import BadBatchGuard, DeferredUpdates
from sae_lens_atm.training.hooks import synchronize
from sae_lens_atm.training.preflight.amounts import schedule_parts
from sae_lens_atm.training.preflight.memory import available_bytes, sae_size, size_text, step_bytes
from sae_lens_atm.training.run_file import Run, batch_size_of
from sae_lens_atm.training.supervise import supervise

_REPEATS = 3
_LONGEST_REASON = 200  # characters
_LARGEST_CHECKPOINT = 2**31  # larger ones are not written to be timed


BEFORE, TRAINING, AFTER = "before step 1", "training", "after training"
Report = Callable[[str], None]
"""Is called with the name of each measurement before it starts."""


class Entry(NamedTuple):
    """One row of the table."""

    phase: str
    what: str
    seconds: float | None
    """None if it was not timed."""
    reason: str = ""
    """Why it was not timed."""


class NotTimed(Exception):
    """Something was not timed. The message says why."""


class Timed(NamedTuple):
    """The time of some work, measured on a part of it."""

    seconds: float
    """For the whole of it."""
    measured: int
    """The size that was measured: samples, tokens or the like."""
    size: int
    """The size of the whole."""

    @property
    def note(self) -> str:
        """A remark if only a part was measured."""
        return "" if self.measured == self.size else f", scaled up from {self.measured:,}"


def time_work(
    work: Callable[[int], object],
    sizes: Sequence[int],
    limit: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Timed:
    """Time work of growing size, as far as a time limit allows, and extrapolate to the largest.

    Time is taken to be linear in size, with a constant part.

    Args:
        work: is called with a size. It must wait for the device.
        sizes: sizes to try, in ascending order. The last is the size of interest. The work of the
            first size is also done once before, to warm up: that is not timed.
        limit: seconds. A size is tried only if it is expected to end within the limit.
        clock: returns the time in seconds.
    """
    work(sizes[0])
    start = clock()

    def seconds(size: int) -> float:
        before = clock()
        work(size)
        return clock() - before

    def predicted(size: int) -> float:
        (n, t) = measured[-1]
        if len(measured) == 1:
            return t * size / n
        (m, s) = measured[-2]
        return t + max(t - s, 0.0) / (n - m) * (size - n)

    measured = [(sizes[0], seconds(sizes[0]))]
    for size in sizes[1:]:
        if clock() - start + predicted(size) > limit:
            break
        measured.append((size, seconds(size)))
    size, first = measured[-1]
    times = [first]
    while len(times) < _REPEATS and clock() - start + first <= limit:
        times.append(seconds(size))
    measured[-1] = (size, statistics.median(times))
    return Timed(predicted(sizes[-1]), size, sizes[-1])


def sizes_up_to(size: int, smallest: int = 16) -> list[int]:
    """Return some sizes to time before a size: each is eight times the one before."""
    sizes = [size]
    while sizes[0] // 8 >= smallest:
        sizes.insert(0, sizes[0] // 8)
    return sizes


# --- steps of the SAE ----------------------------------------------------------------------------


def seconds_per_step(run: Run, limit: float = 5.0) -> float:
    """Return the mean time of a training step over the schedule of a run.

    Raises:
        NotTimed: the device has too little memory.
    """
    with timed_trainer(run) as trainer:
        parts = time_steps(run, trainer, limit)
    steps = sum(number for _, number in parts)
    return sum(timed.seconds * number for timed, number in parts) / max(steps, 1)


@contextmanager
def timed_trainer(run: Run, batch: int | None = None) -> Generator[SAETrainer[Any, Any]]:
    """Make the trainer of a run, under the hooks that all runs have, without data.

    Args:
        run: the run.
        batch: the batch size; None takes the run's. It decides whether the memory is enough.

    Raises:
        NotTimed: the device has too little memory.
    """
    cfg = run.runner
    size, batch = sae_size(cfg.sae), batch or batch_size_of(run)
    needed, free = size.resident + step_bytes(cfg.sae, batch), available_bytes(cfg.device)
    if free is not None and needed > 0.9 * free:
        raise NotTimed(
            f"training steps need {size_text(needed)}, and {cfg.device} has {size_text(free)} free"
        )
    settings = replace(cfg.to_sae_trainer_config(), logger=LoggingConfig(log_to_wandb=False))
    with temporary_seed(0):
        sae = TrainingSAE[Any].from_dict(cfg.sae.to_dict()).to(cfg.device)
        trainer: SAETrainer[Any, Any] = SAETrainer(settings, sae, iter(()))
        with supervise(trainer, [BadBatchGuard(trainer), DeferredUpdates(trainer)]):
            yield trainer


def time_steps(
    run: Run,
    trainer: SAETrainer[Any, Any],
    limit: float,
    first: int = 0,
    batch: int | None = None,
) -> list[tuple[Timed, int]]:
    """Time training steps on random activations, in each part of the schedule.

    Args:
        run: the run.
        trainer: its trainer, from `timed_trainer`.
        limit: seconds for all parts together.
        first: the first step, after which a run resumes.
        batch: the batch size; None takes the run's.

    Returns:
        For each part, the time of a step and the number of steps.
    """
    parts = schedule_parts(run.runner.sae, first, run.runner.total_training_steps)
    x = torch.randn(batch or batch_size_of(run), run.runner.sae.d_in, device=run.runner.device)

    def step(size: int) -> None:
        try:
            trainer.step(x[:size])
        except StopIteration:  # the guard asks for another batch after a bad one
            raise NotTimed(
                "a step on random activations gives NaN or Inf values, check sae.dtype, lr and the "
                "coefficients of sae"
            ) from None
        except Exception as error:  # of SAELens' or another plugin's class
            raise NotTimed(
                "a step on random activations fails, check the fields of sae: "
                f"{one_line(error)[:_LONGEST_REASON]}"
            ) from error
        synchronize(run.runner.device)

    sizes = usable_sizes(step, sizes_up_to(len(x)))
    found: list[tuple[Timed, int]] = []
    for start, number in parts:
        if isinstance(trainer.sae, ATMTrainingSAE):
            trainer.sae.tracker.steps.fill_(start)
        found.append((time_work(step, sizes, limit / len(parts)), number))
    return found


def usable_sizes(work: Callable[[int], object], sizes: Sequence[int]) -> Sequence[int]:
    """Return the sizes without the first ones at which the work fails. The last always stays.

    An architecture may need more samples than the smallest size has.
    """
    for first, size in enumerate(sizes[:-1]):
        with suppress(NotTimed):
            work(size)
            return sizes[first:]
    return sizes[-1:]


def time_checkpoint(trainer: SAETrainer[Any, Any], more_bytes: int) -> float:
    """Return the time to save a checkpoint.

    Args:
        trainer: the trainer to save.
        more_bytes: size of what the checkpoint of the run holds beside the trainer's state.

    Raises:
        NotTimed: the checkpoint is too large to be written for this.
    """
    needed = sae_size(trainer.sae.cfg).checkpoint
    if needed > _LARGEST_CHECKPOINT:
        raise NotTimed(f"a checkpoint has {size_text(needed + more_bytes)}")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        trainer.save_checkpoint("timed", base_path=folder)
        write_manifest(Path(folder) / "timed")
        seconds = time.perf_counter() - start
    return seconds * (needed + more_bytes) / needed


def duration(seconds: float) -> str:
    """Return a time in a unit that suits it."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def time_left(seconds: float) -> str:
    """Return a phrase on the time that is left, about."""
    return f"{'about ' if seconds >= 1 else ''}{duration(max(seconds, 0))} left"
