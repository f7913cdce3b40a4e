"""Run jobs as tasks of a Ray cluster. Its machines must share the output folder."""

import os
import socket
from collections.abc import Sequence
from typing import Any

import torch

from sae_lens_atm.compare.run.processes import Job, JobEvents, prepare_process
from sae_lens_atm.errors import SettingsError, one_line, with_type
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.phases import Phase

LOCAL = "local"
"""Address that starts a cluster of this machine alone, for the time of the jobs."""


def run_jobs_on_ray(
    jobs: Sequence[Job], address: str, gpus: int, events: JobEvents, stop: StopFlag
) -> dict[str, str]:
    """Run all jobs, as many at once as the cluster has room for.

    Args:
        jobs: the jobs, in the order in which they start.
        address: address of the cluster, `auto` for the cluster of this machine, or `LOCAL`.
        gpus: number of GPUs that each job takes.
        events: callbacks.
        stop: flag to stop all jobs.

    Returns:
        The errors of the jobs that failed, by label.

    Raises:
        SettingsError: Ray is not installed, or there is no cluster at the address.
        Interrupted: `stop` was set, and all running jobs have ended.
    """
    try:
        import ray
        from ray.util.queue import Queue
    except ImportError as error:
        raise SettingsError("--ray needs Ray: pip install 'sae-lens-atm[ray]'") from error
    connected_here = not ray.is_initialized()
    if connected_here:
        _connect(ray, address)
    try:
        messages: Any = Queue()
        task: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_run_on_ray)
        waiting = {task.remote(job, i, messages): i for i, job in enumerate(jobs)}
        failed: dict[str, str] = {}
        begun: set[int] = set()
        stopping = False
        while waiting:
            if stop.signal_number is not None and not stopping:
                stopping = True
                for reference in reversed(list(waiting)):  # jobs that have not begun come first
                    ray.cancel(reference)
            done, _ = ray.wait(list(waiting), timeout=0.5)
            for i, message in messages.get_nowait_batch(messages.size()):
                if message is None:
                    begun.add(i)
                    events.started(jobs[i])
                elif isinstance(message, Phase):
                    events.is_in(jobs[i], message)
                else:
                    events.advanced(jobs[i], message)
            for reference in done:
                i = waiting.pop(reference)
                error = _error_of(ray, reference)
                if error is not None and not stopping:
                    failed[jobs[i].label] = error
                if i in begun:
                    events.ended(jobs[i], None if stopping else error)
    finally:
        if connected_here:
            ray.shutdown()
    stop.check()
    return failed


def _connect(ray: Any, address: str) -> None:
    cluster = {"num_cpus": os.cpu_count()} if address == LOCAL else {"address": address}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends usage statistics by default
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    try:
        if colon:  # without this check Ray tries for ten minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(**cluster, log_to_driver=False, include_dashboard=False, configure_logging=False)
    except Exception as error:  # Ray raises many types, also `Exception` itself
        reason = one_line(error)
        raise SettingsError(f"--ray {address}: no cluster at this address ({reason})") from error


def _error_of(ray: Any, reference: Any) -> str | None:
    """Return the error of a task that has ended, or None."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:  # its process died, or it was cancelled
        return with_type(error)[:300]


def _run_on_ray(job: Job, i: int, messages: Any) -> str | None:
    """Run a job in a process of Ray, and return its error or None."""
    torch.set_num_threads(1)
    prepare_process()
    stop = StopFlag()
    messages.put((i, None))
    try:
        with stop.on_signals():  # Ray cancels a task with SIGINT
            job.work(lambda progress: messages.put((i, progress)), stop)
    except Exception as error:
        return with_type(error)
    return None
