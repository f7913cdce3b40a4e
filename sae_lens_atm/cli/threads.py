"""The number of torch's threads on a CPU."""

import os
import warnings

import torch


def use_threads(threads: int | None) -> None:
    """Set the number of torch's threads in this process. None leaves it as it is."""
    if threads is not None:
        torch.set_num_threads(threads)


def warn_if_busy(device: str, threads: int) -> None:
    """Warn if other processes keep the cores busy that torch's threads would use.

    Threads that wait for each other then get a core in turn. A step can take twenty times as long.

    Args:
        device: the device of the SAE.
        threads: number of threads of each process.
    """
    if device != "cpu" or threads == 1 or not hasattr(os, "getloadavg"):
        return
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        warnings.warn(
            f"the load of this machine is {load:.1f} on {cores} cores, and {threads} threads may "
            "slow each other down: set --threads 1, or OMP_NUM_THREADS=1",
            stacklevel=2,
        )
