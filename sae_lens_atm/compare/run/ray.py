"""Jobs on a Ray cluster: by Ray's own tasks, whose machines share the folder of the results."""

import os
import socket
from collections.abc import Sequence
from typing import Any

import torch

from sae_lens_atm.compare.run.processes import Job, Listener, prepare_process
from sae_lens_atm.errors import Interrupted, SettingsError
from sae_lens_atm.training.hooks import StopFlag

LOCAL = "local"
"""In the place of an address: a cluster of this machine alone, for as long as the jobs take."""


def run_jobs_on_ray(
    jobs: Sequence[Job], address: str, gpus: int, listener: Listener, stop: StopFlag
) -> dict[str, str]:
    """Run all jobs, as many at once as the cluster has room for; returns the errors of those that
    failed.

    Args:
        address: of the cluster, `auto` for the one of this machine, or `LOCAL`.
        gpus: that a job takes.

    Raises:
        SettingsError: Ray is not installed, or there is no cluster.
        Interrupted: `stop` asked for it, and every job under way has stopped.
    """
    try:
        import ray
        from ray.util.queue import Queue
    except ImportError as error:
        raise SettingsError("--ray needs Ray: pip install 'sae-lens-atm[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address)
    try:
        messages: Any = Queue()
        task: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_work)
        waiting = {task.remote(job, place, messages): place for place, job in enumerate(jobs)}
        failed: dict[str, str] = {}
        begun: set[int] = set()
        told_to_stop = False
        while waiting:
            if stop.signal_number is not None and not told_to_stop:
                told_to_stop = True
                for reference in reversed(list(waiting)):  # first those that have not begun
                    ray.cancel(reference)
            done, _ = ray.wait(list(waiting), timeout=0.5)
            for place, steps in messages.get_nowait_batch(messages.size()):
                if steps is None:
                    begun.add(place)
                    listener.started(jobs[place])
                else:
                    listener.advanced(jobs[place], steps)
            for reference in done:
                place = waiting.pop(reference)
                error = _error(ray, reference)
                if error is not None and not told_to_stop:
                    failed[jobs[place].label] = error
                if place in begun:
                    listener.ended(jobs[place], None if told_to_stop else error)
    finally:
        if ours:
            ray.shutdown()
    if stop.signal_number is not None:
        raise Interrupted(None, stop.signal_number)
    return failed


def _connect(ray: Any, address: str) -> None:
    own = {"num_cpus": os.cpu_count()} if address == LOCAL else {"address": address}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report that it is used
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    try:
        if colon:  # Ray tries for ten minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(**own, log_to_driver=False, include_dashboard=False, configure_logging=False)
    except Exception as error:  # Ray's are of many kinds, some bare
        reason = " ".join(str(error).split())
        raise SettingsError(f"--ray {address}: no cluster there ({reason})") from error


def _error(ray: Any, reference: Any) -> str | None:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:  # its process died, or it was cancelled
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _work(job: Job, place: int, messages: Any) -> str | None:
    """A job, in a process of Ray's; returns its error."""
    torch.set_num_threads(1)
    prepare_process()
    stop = StopFlag()
    messages.put((place, None))
    try:
        with stop.on_signals():  # cancelling is a SIGINT
            job.work(lambda steps: messages.put((place, steps)), stop)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None
