"""Training of several SAEs on one stream of activations, each under supervision."""

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from sae_lens import SAETrainer
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.compare.plan.planned_run import TRAINER_FIELDS, PlannedRun
from sae_lens_atm.compare.run.curve import CurveRecorder
from sae_lens_atm.compare.run.l0_controller import L0Controller
from sae_lens_atm.data.random_state import load_random_state, save_random_state
from sae_lens_atm.errors import Interrupted, NonFiniteBatchError
from sae_lens_atm.files import replace_folder
from sae_lens_atm.training.before_first_step import BeforeFirstStep, ModelBatches
from sae_lens_atm.training.guard import BadBatchGuard, DeferredUpdates
from sae_lens_atm.training.history import History
from sae_lens_atm.training.hooks import (
    CollapseWarning,
    OnStep,
    StepCallback,
    StepTimer,
    StopFlag,
    StopRequest,
    StopRequested,
)
from sae_lens_atm.training.latent_history import LatentHistory
from sae_lens_atm.training.phases import OnPhase
from sae_lens_atm.training.preflight.amounts import estimation_batches, llm_batches_of
from sae_lens_atm.training.run_file import LanguageModelRun
from sae_lens_atm.training.supervise import Hook, Step, replace_attribute, supervise


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


def estimate_scales(trainer: MultiSAETrainer) -> None:
    """Estimate the scale of the activations for each SAE that needs it, on the same batches.

    In place of SAELens' method, which first stores as many batches as the estimate may take.
    """
    stored: list[dict[str, Tensor]] = []

    def batches(hook_name: str) -> Iterator[Tensor]:
        for number in count():
            if number == len(stored):
                stored.append(next(trainer.data_provider))
            yield stored[number][hook_name]

    for name, inner in trainer.trainers.items():
        scaler, cfg = inner.activation_scaler, inner.sae.cfg
        estimates = {
            "expected_average_only_in": (scaler.scaling_factor, scaler.estimate_scaling_factor),
            "covariance_whitening": (scaler.whitening, scaler.estimate_whitening),
        }
        known, estimate = estimates.get(cfg.normalize_activations, (0, None))
        if known is None and estimate is not None:
            estimate(
                d_in=cfg.d_in,
                data_provider=batches(trainer.hook_names[name]),
                n_batches_for_norm_estimate=trainer.cfg.n_batches_for_norm_estimate,
            )


class NamedErrors(Hook):
    """Names the SAE in the error of too many bad batches."""

    def __init__(self, label: str) -> None:
        self._label = label

    @override
    def wrap_step(self, step: Step) -> Step:
        def named(batch: Tensor) -> TrainStepOutput:
            try:
                return step(batch)
            except NonFiniteBatchError as error:
                raise NonFiniteBatchError(f"{self._label}: {error}") from None

        return named


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
    homes: dict[str, Path]
    """The folders of the runs."""
    recorders: dict[str, CurveRecorder]
    latents: dict[str, LatentHistory]
    saved_state: Path
    """Folder where the state of the group is saved if it is stopped."""
    resumed: Path | None
    """Folder of the state that the group continues from."""
    points: list[int]
    save_at: set[int]
    """Numbers of steps after which the state of the group is saved."""
    on_step: OnStep
    on_phase: OnPhase
    stop: StopFlag

    @override
    def _run_with_interruption_handling(self, trainer: MultiSAETrainer) -> Any:
        batches = SharedBatches(trainer.data_provider)
        trainer.data_provider = batches
        self.recorders, self.latents = {}, {}
        phases: BeforeFirstStep | None = None
        with ExitStack() as supervisions:
            estimate = partial(estimate_scales, trainer)
            replace_attribute(trainer, "_estimate_scaling_factors", estimate, supervisions)
            for name, planned in self.planned.items():
                inner = _with_own_settings(trainer.trainers[name], planned)
                inner.data_provider = batches.of(trainer.hook_names[name])
                trainer.trainers[name] = inner
                hooks = self._hooks(inner, name, planned)
                if phases is None:  # one SAE stops and saves for the group
                    stop = StopRequest(self.stop)
                    batches_of_model = self._model_batches()
                    phases = BeforeFirstStep(inner, stop, self.on_phase, batches_of_model)
                    save = partial(self._save, trainer)
                    hooks += [stop, GroupCheckpoints(trainer, save, self.save_at), phases]
                supervisions.enter_context(supervise(inner, hooks))
            if self.resumed is not None:
                self._resume(trainer, self.resumed)
            try:
                return trainer.fit()
            except StopRequested:
                if phases is not None and phases.started:
                    self._save(trainer)
                raise Interrupted(None, self.stop.signal_number or signal.SIGINT) from None

    def _hooks(self, trainer: SAETrainer[Any, Any], name: str, planned: PlannedRun) -> list[Hook]:
        parameter, timer = planned.l0_parameter, StepTimer(trainer.sae.device)
        controller = L0Controller(trainer, parameter, planned.l0) if parameter.controlled else None
        recorder = CurveRecorder(trainer, self.points, timer, None, controller)
        checkpoint = self.resumed / name if self.resumed is not None else None
        home = self.homes[name]
        latents = LatentHistory(trainer, home, self.points, checkpoint)
        self.recorders[name], self.latents[name] = recorder, latents
        return [
            timer,
            BadBatchGuard(trainer, planned.run.max_bad_batches),
            NamedErrors(planned.label),
            DeferredUpdates(trainer),
            *([] if controller is None else [controller]),
            recorder,
            latents,
            History(trainer, home, checkpoint),
            CollapseWarning(trainer),
            StepCallback(trainer, self.on_step),
        ]

    def _model_batches(self) -> ModelBatches:
        run = next(iter(self.planned.values())).run
        assert isinstance(run, LanguageModelRun)
        estimated = max(estimation_batches(p.run) for p in self.planned.values())
        tokens = estimated * run.runner.train_batch_size_tokens
        fill, estimate = (llm_batches_of(run.runner, served + 1) for served in (0, tokens))
        return ModelBatches(self.activations_store, fill, estimate)

    def _save(self, trainer: MultiSAETrainer) -> None:
        """Save the state of the whole group, or nothing."""
        trainer.cfg.checkpoint_path = str(self.saved_state.parent)
        partial_folder = self.saved_state.with_name(".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        trainer.save_checkpoint(partial_folder.name)
        save_random_state(partial_folder)
        replace_folder(partial_folder, self.saved_state)

    def _resume(self, trainer: MultiSAETrainer, state: Path) -> None:
        # SAELens has loaded the state into trainers that were replaced since.
        trainer.load_checkpoint(state)
        for name, recorder in self.recorders.items():
            recorder.load(state / name)
        load_random_state(state)


def _with_own_settings(trainer: SAETrainer[Any, Any], planned: PlannedRun) -> SAETrainer[Any, Any]:
    """Return a trainer with the settings of its own entry. SAELens gives all trainers the same."""
    cfg = planned.run.runner
    own = {name: getattr(cfg, name) for name in TRAINER_FIELDS if hasattr(cfg, name)}
    return SAETrainer(replace(trainer.cfg, **own), trainer.sae, trainer.data_provider)
