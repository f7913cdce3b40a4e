"""Hooks that stop training, warn, call back, and measure time."""

import signal
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from sae_lens import SAETrainer
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.errors import Interrupted
from sae_lens_atm.method.importance import effective_latents
from sae_lens_atm.sae.atm_sae import ATMTrainingSAE
from sae_lens_atm.training.guard import MaxOverRanks
from sae_lens_atm.training.supervise import Hook, Step

OnStep = Callable[[SAETrainer[Any, Any], TrainStepOutput], None]
COLLAPSED = 2.0
"""Number of effective latents below which importance has collapsed."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


# --- stopping ------------------------------------------------------------------------------------


class StopRequested(Exception):
    """Training stops before the next step."""


@dataclass
class StopFlag:
    """A request to stop before the next step, made by a signal or by another thread."""

    signal_number: int | None = None
    saving: bool = False
    """Whether the state is being saved. A second SIGINT does not interrupt that."""

    def request(self, signal_number: int = signal.SIGINT) -> None:
        """Request a stop."""
        self.signal_number = signal_number

    def check(self) -> None:
        """Raise `Interrupted` if a stop is requested. There is nothing to save."""
        if self.signal_number is not None:
            raise Interrupted(None, self.signal_number)

    @contextmanager
    def on_signals(self) -> Generator[None]:
        """Request a stop on SIGINT and SIGTERM.

        A second SIGINT raises KeyboardInterrupt at once, except while the state is being saved.
        Outside the main thread, where Python allows no signal handlers, this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, _frame: FrameType | None) -> None:
            again = self.signal_number is not None and number == signal.SIGINT
            if again and not self.saving:
                raise KeyboardInterrupt
            self.request(number)

        before = {number: signal.signal(number, handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class StopRequest(Hook):
    """Stops training before the next step, on all ranks, when one of them requests it.

    Raises:
        StopRequested: from `between_steps`.
    """

    def __init__(self, stop: StopFlag, max_over_ranks: MaxOverRanks = int) -> None:
        self._stop, self._max_over_ranks = stop, max_over_ranks

    @override
    def between_steps(self) -> None:
        number = self._max_over_ranks(self._stop.signal_number or 0)
        if number:
            self._stop.request(number)
            raise StopRequested


# --- observing -----------------------------------------------------------------------------------


class CollapseWarning(Hook):
    """Warns once if hardly more than one latent is important.

    Args:
        trainer: the trainer to observe. For SAEs other than `ATMTrainingSAE` this does nothing.
        every: number of steps between two checks. Each check waits for the device.
    """

    def __init__(self, trainer: SAETrainer[Any, Any], every: int = 1000) -> None:
        self._trainer, self._every = trainer, every
        self._warned = False

    @override
    def between_steps(self) -> None:
        sae, step = self._trainer.sae, self._trainer.n_training_steps
        if self._warned or step == 0 or step % self._every or not isinstance(sae, ATMTrainingSAE):
            return
        effective = float(effective_latents(sae.importance))
        if effective < COLLAPSED < sae.cfg.d_sae:
            self._warned = True
            warnings.warn(
                f"importance has collapsed: at step {step} there are {effective:.2f} effective "
                f"latents of {sae.cfg.d_sae}",
                stacklevel=2,
            )


class StepCallback(Hook):
    """Calls a function after each step, with the trainer and the output of the step."""

    def __init__(self, trainer: SAETrainer[Any, Any], on_step: OnStep) -> None:
        self._trainer, self._on_step = trainer, on_step

    @override
    def after_step(self, output: TrainStepOutput) -> None:
        self._on_step(self._trainer, output)


class StepTimer(Hook):
    """Measures the time of each step. Each measurement waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        """One entry for each step."""
        self._device = device

    @property
    def median_ms(self) -> float:
        """Median time of a step, in milliseconds; NaN before the first step."""
        return 1000 * statistics.median(self.seconds) if self.seconds else float("nan")

    @override
    def wrap_step(self, step: Step) -> Step:
        def timed_step(batch: Tensor) -> TrainStepOutput:
            synchronize(self._device)
            start = time.perf_counter()
            output = step(batch)
            synchronize(self._device)
            self.seconds.append(time.perf_counter() - start)
            return output

        return timed_step


def synchronize(device: str | torch.device) -> None:
    """Wait until a device has done all work."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()
