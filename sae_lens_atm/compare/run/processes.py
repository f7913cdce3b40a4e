"""Run each job in its own process.

A job that crashes does not stop the others, and the peak memory of each can be measured.
"""

import logging
import math
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

from sae_lens_atm.errors import Interrupted, with_type
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.phases import Phase
from sae_lens_atm.training.quiet import silence_saelens

_REPORT_EVERY = 25  # steps
_SIGTERM = 15


OnProgress = Callable[[int | Phase], None]
"""Is called with a number of steps that were taken, or with the phase of other work."""


class Work(Protocol):
    """The function of a job. It must be picklable, as it is sent to another process."""

    def __call__(self, _on_progress: OnProgress, _stop: StopFlag, /) -> None: ...


@dataclass(frozen=True)
class Job:
    """A piece of work, and its number of steps."""

    label: str
    steps: int
    work: Work
    needed: bool = False
    """Whether the jobs after it cannot do without its result."""
    alone: bool = False
    """Whether no other job is planned beside it. By default it then gets all cores."""


class JobEvents(Protocol):
    """Callbacks for jobs that start, advance and end."""

    def started(self, job: Job) -> None: ...
    def advanced(self, job: Job, steps: int) -> None: ...
    def is_in(self, job: Job, phase: Phase) -> None: ...
    def ended(self, job: Job, error: str | None) -> None: ...


def run_jobs(
    jobs: Sequence[Job],
    at_once: int,
    events: JobEvents,
    stop: StopFlag,
    threads: int | None = None,
) -> dict[str, str]:
    """Run all jobs, and return the errors of those that failed, by label.

    Args:
        jobs: the jobs, in the order in which they start.
        at_once: maximum number of processes.
        events: callbacks.
        stop: flag to stop all jobs.
        threads: number of threads of each process; None divides the cores among the processes. A
            job that is `alone` gets all cores.

    Raises:
        Interrupted: `stop` was set, and all running jobs have ended.
    """
    # The fork server imports the package once and forks it for each job, which takes milliseconds.
    # It never computes anything, so CUDA is not initialised in it.
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(["sae_lens_atm.compare"])
    # The number of threads changes the last bits of a result. It must not depend on what is left.
    threads = threads or threads_per_job(1 if any(job.alone for job in jobs) else at_once)
    waiting, failed = deque(jobs), dict[str, str]()
    running: dict[Connection, tuple[Any, Job]] = {}
    stopping = False
    while running or (waiting and not stopping):
        while waiting and len(running) < at_once and stop.signal_number is None:
            job = waiting.popleft()
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_run_in_process, args=(job, sender, threads))
            process.start()
            sender.close()
            running[receiver] = (process, job)
            events.started(job)
        if stop.signal_number is not None and not stopping:
            stopping = True
            for process, _ in running.values():
                process.terminate()
        for connection in wait(list(running), timeout=0.5):
            assert isinstance(connection, Connection)
            process, job = running[connection]
            try:
                message: int | str | Phase = connection.recv()
            except (EOFError, OSError):
                process.join()
                del running[connection]
                error = failed.get(job.label)
                if stopping and error is None and process.exitcode != 0:
                    continue  # it was stopped, and is neither done nor failed
                if error is None and process.exitcode != 0:
                    error = failed[job.label] = f"ended with exit code {process.exitcode}"
                events.ended(job, error)
                continue
            if isinstance(message, str):
                failed[job.label] = message
            elif isinstance(message, Phase):
                events.is_in(job, message)
            else:
                events.advanced(job, message)
    stop.check()
    return failed


def threads_per_job(at_once: int) -> int:
    """Return the number of threads of each job, so that all jobs together use every core.

    OMP_NUM_THREADS is the largest number.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    most = int(given) if given.isdecimal() and int(given) else math.inf
    return int(min(max((os.cpu_count() or 1) // at_once, 1), most))


def _run_in_process(job: Job, connection: Connection, threads: int) -> None:
    """Run a job, in its process. Steps are sent as numbers, phases as such, an error as text."""
    torch.set_num_threads(threads)
    prepare_process()
    stop = StopFlag()

    def report(progress: int | Phase) -> None:
        try:
            connection.send(progress)
        except OSError:  # the parent process has ended: save the state and end, too
            stop.request(_SIGTERM)

    try:
        with stop.on_signals():
            job.work(report, stop)
    except Interrupted:
        sys.exit(128 + _SIGTERM)
    except Exception as error:
        if os.environ.get("SAE_LENS_ATM_DEBUG"):
            raise
        connection.send(with_type(error))
        sys.exit(1)


def prepare_process() -> None:
    """Silence SAELens in the process of a job, as all jobs share one terminal."""
    silence_saelens()
    sae_lens.logger.setLevel(logging.ERROR)


class StepCounter:
    """Counts steps, and reports every 25 of them.

    Args:
        report: is called with the number of steps since its last call.
    """

    def __init__(self, report: Callable[[int], None]) -> None:
        self._report = report
        self._steps = 0

    def count(self) -> None:
        """Add one step."""
        self._steps += 1
        if self._steps % _REPORT_EVERY == 0:
            self._report(_REPORT_EVERY)

    def on_step(self, _trainer: SAETrainer[Any, Any], _output: Any) -> None:
        """Add one training step."""
        self.count()


def cpu_name() -> str:
    """Return the processor's model name, or "unknown" where the system does not provide it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")
