"""Many runs in processes of their own: one that crashes takes no other with it, and the memory of
each can be told."""

import logging
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import sae_lens
import torch
from sae_lens import SAETrainer

from sae_lens_atm.errors import Interrupted
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.quiet import silence_saelens

_REPORT_EVERY = 25  # steps
_SIGTERM = 15


class Work(Protocol):
    """What a job does; a function of a module, as it travels to another process."""

    def __call__(self, _on_progress: Callable[[int], None], _stop: StopFlag, /) -> None: ...


@dataclass(frozen=True)
class Job:
    """Some work, and how many steps of it there are."""

    label: str
    steps: int
    work: Work


class Listener(Protocol):
    """Hears how jobs get on."""

    def started(self, job: Job) -> None: ...
    def advanced(self, job: Job, steps: int) -> None: ...
    def ended(self, job: Job, error: str | None) -> None: ...


def run_jobs(
    jobs: Sequence[Job], at_once: int, listener: Listener, stop: StopFlag
) -> dict[str, str]:
    """Run all jobs, some at once; returns the errors of those that failed.

    Raises:
        Interrupted: `stop` asked for it, and every job under way has stopped.
    """
    # A server that has imported all of this once, and forks for each job without having computed
    # anything: a new process takes milliseconds, and CUDA is untouched in it.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["sae_lens_atm.compare"])
    threads = threads_each(at_once)
    waiting, failed = deque(jobs), dict[str, str]()
    running: dict[Connection, tuple[Any, Job]] = {}
    told_to_stop = False
    while running or (waiting and not told_to_stop):
        while waiting and len(running) < at_once and stop.signal_number is None:
            job = waiting.popleft()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(job, theirs, threads))
            process.start()
            theirs.close()
            running[ours] = (process, job)
            listener.started(job)
        if stop.signal_number is not None and not told_to_stop:
            told_to_stop = True
            for process, _ in running.values():
                process.terminate()
        for connection in wait(list(running), timeout=0.5):
            assert isinstance(connection, Connection)
            process, job = running[connection]
            try:
                message: int | str = connection.recv()
            except (EOFError, OSError):
                process.join()
                del running[connection]
                error = failed.get(job.label)
                if error is None and process.exitcode != 0 and not told_to_stop:
                    error = failed[job.label] = f"ended with exit code {process.exitcode}"
                listener.ended(job, error)
                continue
            if isinstance(message, str):
                failed[job.label] = message
            else:
                listener.advanced(job, message)
    if stop.signal_number is not None:
        raise Interrupted(None, stop.signal_number)
    return failed


def threads_each(at_once: int) -> int:
    """The threads that each of several jobs has."""
    return max((os.cpu_count() or 1) // at_once, 1)


def _child(job: Job, connection: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    prepare_process()
    stop = StopFlag()

    def report(steps: int) -> None:
        try:
            connection.send(steps)
        except OSError:  # whoever started this is gone: keep the state and end
            stop.request(_SIGTERM)

    try:
        with stop.on_signals():
            job.work(report, stop)
    except Interrupted:
        sys.exit(128 + _SIGTERM)
    except Exception as error:
        if os.environ.get("SAE_LENS_ATM_DEBUG"):
            raise
        connection.send(" ".join(f"{type(error).__name__}: {error}".split()))
        sys.exit(1)


def prepare_process() -> None:
    """Silence SAELens, in a process of a job's own."""
    silence_saelens()
    sae_lens.logger.setLevel(logging.ERROR)


class StepCounter:
    """Reports steps now and then, as an `on_step` of training."""

    def __init__(self, report: Callable[[int], None]) -> None:
        self._report = report
        self._steps = 0

    def count(self) -> None:
        """One step more."""
        self._steps += 1
        if self._steps % _REPORT_EVERY == 0:
            self._report(_REPORT_EVERY)

    def on_step(self, _trainer: SAETrainer[Any, Any], _output: Any) -> None:
        self.count()


def cpu_name() -> str:
    """What the processor calls itself, where it does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")
