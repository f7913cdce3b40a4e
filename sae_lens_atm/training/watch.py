"""What stands around SAELens' trainer: stopping, resuming, checkpoints, bad batches.

The trainer is SAELens' own. It is watched through two of its public seams: `step`, which does one
training step, and `maybe_reset_sparsity`, which `fit` calls between two steps.
"""

import signal
import threading
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from sae_lens import SAETrainer, TrainingSAE
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor

from sae_lens_atm.errors import Interrupted, NonFiniteBatchError, RankLostError
from sae_lens_atm.method.importance import effective_latents
from sae_lens_atm.sae.atm_sae import ATMTrainingSAE
from sae_lens_atm.training.checkpoints import (
    load_random_state,
    save_atomically,
    save_nothing,
    skipped_batches,
)
from sae_lens_atm.training.guard import Guard
from sae_lens_atm.training.parallel import together
from sae_lens_atm.training.ranks import Ranks

OnStep = Callable[[SAETrainer[Any, Any], TrainStepOutput], None]


class _StopRequested(Exception):
    pass


_LOOK_EVERY = 1000  # steps between two looks at the importance: each waits for the device
_COLLAPSED = 2.0  # effective latents below which importance has collapsed
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopFlag:
    """Asks for a stop at the next step boundary, from a signal or from another thread."""

    signal_number: int | None = None
    saving: bool = False
    """Whether the state is being saved, which a second SIGINT must not cut short."""

    def request(self, signal_number: int = signal.SIGINT) -> None:
        self.signal_number = signal_number

    @contextmanager
    def on_signals(self) -> Generator[None]:
        """Let SIGINT and SIGTERM request a stop; a second SIGINT stops at once, saving excepted."""
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


@dataclass
class Watch:
    """Watches one run of a trainer, from a checkpoint if one is given.

    Args:
        max_bad_batches: bad batches in a row at which the run stops; fewer are skipped.
        keep: how many checkpoints to keep, all if None.
        ranks: the processes of this training, if it has several.
        owns_random_state: whether random numbers go on as in the checkpoint from the beginning;
            else the data see to that.
    """

    on_step: OnStep | None
    stop: StopFlag
    checkpoint: Path | None
    max_bad_batches: int = 10
    keep: int | None = None
    ranks: Ranks | None = None
    owns_random_state: bool = True
    guard: Guard | None = field(default=None, init=False)
    collapsed: bool = field(default=False, init=False)

    @property
    def skipped_batches(self) -> int:
        return 0 if self.guard is None else self.guard.skipped

    @property
    def writes(self) -> bool:
        """Whether this process writes checkpoints and results."""
        return self.ranks is None or self.ranks.rank == 0

    def fit(self, trainer: SAETrainer[Any, Any]) -> TrainingSAE[Any]:
        save_atomically(trainer, self.keep, lambda: {"skipped_batches": self.skipped_batches})
        if not self.writes:
            save_nothing(trainer)
        guard = self.guard = Guard(trainer, self.max_bad_batches, self._of_all)
        if self.checkpoint is not None:
            guard.skipped = skipped_batches(self.checkpoint)
            self._finish_resuming(trainer, self.checkpoint)
        ranks = self.ranks
        try:
            with nullcontext() if ranks is None else together(trainer, ranks), guard.watching():
                self._attach(trainer, guard)
                return trainer.fit()
        except _StopRequested:
            number = self.stop.signal_number or signal.SIGINT
            raise Interrupted(self._save(trainer), number) from None
        except NonFiniteBatchError as error:
            saved = self._save(trainer)
            raise NonFiniteBatchError(f"{error}; saved {saved}" if saved else str(error)) from None
        except RankLostError as error:
            saved = self._save(trainer)
            told = f"saved {saved}" if saved else "nothing was trained yet"
            if not self.writes:
                told = "the first process saves, if it is there"
            raise RankLostError(f"{error}; {told}") from error

    def _attach(self, trainer: SAETrainer[Any, Any], guard: Guard) -> None:
        step, between_steps = trainer.step, trainer.maybe_reset_sparsity

        def guarded_step(batch: Tensor) -> TrainStepOutput:
            output = guard.step(step, batch)
            if self.on_step is not None:
                self.on_step(trainer, output)
            return output

        def maybe_stop() -> dict[str, Any]:
            asked = self._of_all(self.stop.signal_number or 0)
            if asked:
                self.stop.request(asked)
                raise _StopRequested
            look = self.writes and trainer.n_training_steps % _LOOK_EVERY == 0
            if look and not self.collapsed:
                self.collapsed = warn_of_collapse(trainer)
            return between_steps()

        trainer.step = guarded_step  # pyright: ignore[reportAttributeAccessIssue]
        trainer.maybe_reset_sparsity = maybe_stop  # pyright: ignore[reportAttributeAccessIssue]

    def _of_all(self, number: int) -> int:
        """What any process asks for, so that all do the same in the same step."""
        return number if self.ranks is None else self.ranks.highest(number)

    def _save(self, trainer: SAETrainer[Any, Any]) -> Path | None:
        if self.guard is None or self.guard.batch is None:
            return self.checkpoint  # nothing was trained since
        self.stop.saving = True
        trainer.save_checkpoint(str(trainer.n_training_samples))
        if self.ranks is not None:
            self.ranks.wait()  # a process that ends early may end the others
        return Path(trainer.cfg.checkpoint_path or "") / str(trainer.n_training_samples)

    def _finish_resuming(self, trainer: SAETrainer[Any, Any], checkpoint: Path) -> None:
        """Restore what SAELens' trainer leaves out."""
        samples = trainer.n_training_samples
        # A periodic checkpoint is written before its step is counted.
        trainer.n_training_steps = samples // trainer.cfg.train_batch_size_samples
        trainer.checkpoint_thresholds = [t for t in trainer.checkpoint_thresholds if t >= samples]
        if self.owns_random_state:
            load_random_state(checkpoint)


def warn_of_collapse(trainer: SAETrainer[Any, Any]) -> bool:
    """Say so where hardly more than one latent matters; whether it was said."""
    sae = trainer.sae
    if not isinstance(sae, ATMTrainingSAE) or trainer.n_training_steps == 0:
        return False
    effective = float(effective_latents(sae.importance))
    if not effective < _COLLAPSED < sae.cfg.d_sae:
        return False
    warnings.warn(
        f"importance has collapsed: at step {trainer.n_training_steps} it is that of "
        f"{effective:.2f} latents of {sae.cfg.d_sae}",
        stacklevel=2,
    )
    return True
