"""Training of several SAEs on one stream of activations, each under supervision."""

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from sae_lens import SAETrainer
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.compare.plan.planned_run import TRAINER_FIELDS, PlannedRun
from sae_lens_atm.compare.run.curve import CurveRecorder
from sae_lens_atm.compare.run.l0_controller import L0Controller
from sae_lens_atm.data.random_state import load_random_state, save_random_state
from sae_lens_atm.errors import Interrupted
from sae_lens_atm.training.guard import BadBatchGuard, DeferredUpdates
from sae_lens_atm.training.hooks import (
    CollapseWarning,
    OnStep,
    StepCallback,
    StepTimer,
    StopFlag,
    StopRequest,
    StopRequested,
)
from sae_lens_atm.training.supervise import Hook, supervise


class SharedBatches:
    """The batches of a group. SAEs that reject a batch get the same next one.

    A provider of one trainer (`of`) serves the replacements in the present step only.
    """

    def __init__(self, batches: Iterator[dict[str, Tensor]]) -> None:
        self._batches = batches
        self._step = 0
        self._replacements: list[dict[str, Tensor]] = []

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        self._step += 1
        self._replacements.clear()
        return next(self._batches)

    def of(self, hook_name: str) -> Iterator[Tensor]:
        """Yield replacements of the present batch at one hook of the model."""
        step, used = self._step, 0
        while True:
            if step != self._step:
                step, used = self._step, 0
            if used == len(self._replacements):
                self._replacements.append(next(self._batches))
            used += 1
            yield self._replacements[used - 1][hook_name]


class EstimateFromGoodBatches(Hook):
    """Lets the estimate of the activation scale take further batches in place of bad ones."""

    def __init__(self, trainer: SAETrainer[Any, Any]) -> None:
        self._trainer = trainer

    @override
    def wrap_batches(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        return chain(batches, self._trainer.data_provider)


class GroupCheckpoints(Hook):
    """Saves the state of a group after some steps."""

    def __init__(self, trainer: MultiSAETrainer, save: Callable[[], None], at: set[int]) -> None:
        self._trainer, self._save, self._at = trainer, save, at

    @override
    def between_steps(self) -> None:
        if self._trainer.n_training_steps in self._at:
            self._save()


class GroupRunner(MultiSAETrainingRunner):
    """SAELens' runner of several SAEs. Each of its trainers is supervised."""

    planned: dict[str, PlannedRun]
    recorders: dict[str, CurveRecorder]
    saved_state: Path
    """Folder with the state of a group that was stopped."""
    points: list[int]
    save_at: set[int]
    """Numbers of steps after which the state of the group is saved."""
    on_step: OnStep
    stop: StopFlag

    @override
    def _run_with_interruption_handling(self, trainer: MultiSAETrainer) -> Any:
        batches = SharedBatches(trainer.data_provider)
        trainer.data_provider = batches
        self.recorders = {}
        with ExitStack() as supervisions:
            for name, planned in self.planned.items():
                inner = _with_own_settings(trainer.trainers[name], planned)
                inner.data_provider = batches.of(trainer.hook_names[name])
                trainer.trainers[name] = inner
                hooks = self._hooks(inner, name, planned)
                if len(self.recorders) == 1:  # one SAE stops and saves for the group
                    hooks += self._group_hooks(trainer)
                supervisions.enter_context(supervise(inner, hooks))
            if self.cfg.resume_from_checkpoint is not None:
                self._resume(trainer)
            try:
                return trainer.fit()
            except StopRequested:
                self._save(trainer)
                raise Interrupted(None, self.stop.signal_number or signal.SIGINT) from None

    def _hooks(self, trainer: SAETrainer[Any, Any], name: str, planned: PlannedRun) -> list[Hook]:
        parameter, timer = planned.l0_parameter, StepTimer(trainer.sae.device)
        controller = L0Controller(trainer, parameter, planned.l0) if parameter.controlled else None
        recorder = CurveRecorder(trainer, self.points, timer, None, controller)
        self.recorders[name] = recorder
        return [
            timer,
            EstimateFromGoodBatches(trainer),
            BadBatchGuard(trainer, planned.run.max_bad_batches),
            DeferredUpdates(trainer),
            *([] if controller is None else [controller]),
            recorder,
            CollapseWarning(trainer),
            StepCallback(trainer, self.on_step),
        ]

    def _group_hooks(self, trainer: MultiSAETrainer) -> list[Hook]:
        checkpoints = GroupCheckpoints(trainer, partial(self._save, trainer), self.save_at)
        return [StopRequest(self.stop), checkpoints]

    def _save(self, trainer: MultiSAETrainer) -> None:
        """Save the state of the whole group, or nothing."""
        trainer.cfg.checkpoint_path = str(self.saved_state.parent)
        partial_folder = self.saved_state.with_name(".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        trainer.save_checkpoint(partial_folder.name)
        save_random_state(partial_folder)
        replaced = self.saved_state.with_name(".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.saved_state.exists():
            self.saved_state.rename(replaced)
        partial_folder.rename(self.saved_state)
        shutil.rmtree(replaced, ignore_errors=True)

    def _resume(self, trainer: MultiSAETrainer) -> None:
        # SAELens has loaded the state into trainers that were replaced since.
        trainer.load_checkpoint(self.saved_state)
        for name, recorder in self.recorders.items():
            recorder.load(self.saved_state / name)
        load_random_state(self.saved_state)


def _with_own_settings(trainer: SAETrainer[Any, Any], planned: PlannedRun) -> SAETrainer[Any, Any]:
    """Return a trainer with the settings of its own entry. SAELens gives all trainers the same."""
    cfg = planned.run.runner
    own = {name: getattr(cfg, name) for name in TRAINER_FIELDS if hasattr(cfg, name)}
    return SAETrainer(replace(trainer.cfg, **own), trainer.sae, trainer.data_provider)
