"""Training of one SAE of a comparison on batches that its seed determines."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.util import temporary_seed
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.compare.plan.planned_run import PlannedRun, stored_in
from sae_lens_atm.compare.run.curve import (
    CurveRecorder,
    HeldOutBatch,
    curve_facts,
    importance_of_groups,
)
from sae_lens_atm.compare.run.l0_controller import L0Controller
from sae_lens_atm.compare.run.stored_run import TRAINING, is_trained
from sae_lens_atm.data.language_model import set_metadata
from sae_lens_atm.files import read_json, saved_at_once, write_json
from sae_lens_atm.training.checkpoints import any_checkpoint, check_pickles, reading
from sae_lens_atm.training.curves_page import write_curves
from sae_lens_atm.training.fit import fit
from sae_lens_atm.training.history import History
from sae_lens_atm.training.hooks import OnStep, StepCallback, StepTimer, StopFlag
from sae_lens_atm.training.latent_history import LatentHistory, curve_points
from sae_lens_atm.training.run_file import LanguageModelRun
from sae_lens_atm.training.supervise import Hook

_POSITION_FILENAME = "served_batches.json"


class TrainingData(Protocol):
    """The data of a run. Runs of one seed read the same batches in the same order."""

    def batches(self, served: int) -> Iterator[Tensor]:
        """Return the batches after the first `served` ones, without end."""
        ...

    def held_out(self) -> HeldOutBatch:
        """Return samples that no run is trained on."""
        ...

    def groups(self, sae: TrainingSAE[Any]) -> dict[str, list[int]]:
        """Return groups of latents whose importance is recorded."""
        ...


class CountedBatches(Iterator[Tensor]):
    """Counts the batches that a run reads: training, estimate of the scale, bad batches."""

    def __init__(self, batches: Iterator[Tensor], served: int) -> None:
        self._batches, self.served = batches, served

    def __next__(self) -> Tensor:
        self.served += 1
        return next(self._batches)


class SavedPosition(Hook):
    """Saves in each checkpoint how many batches were read."""

    def __init__(self, batches: CountedBatches) -> None:
        self._batches = batches

    @override
    def on_checkpoint(self, folder: Path) -> None:
        write_json(folder / _POSITION_FILENAME, {"batches": self._batches.served})


def train_one(
    planned: PlannedRun,
    data: TrainingData,
    folder: Path,
    points: int,
    on_step: OnStep,
    stop: StopFlag,
) -> None:
    """Train one SAE and save it. Resume where an earlier call was stopped.

    Raises:
        Interrupted: `stop` requested it. A checkpoint is saved, unless there is no step yet.
    """
    home = folder / planned.folder
    if is_trained(planned, folder):
        return
    planned = stored_in(planned, home)
    cfg = planned.run.runner
    home.mkdir(parents=True, exist_ok=True)
    if cfg.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(cfg.device)
    with temporary_seed(planned.seed):
        sae = TrainingSAE[Any].from_dict(cfg.sae.to_dict()).to(cfg.device)
        if isinstance(planned.run, LanguageModelRun):
            set_metadata(sae, planned.run.runner)
        facts: dict[str, Any] = {}
        if planned.settings.trained:
            at = curve_points(cfg.total_training_steps, points)
            recorder, latents = _fit(planned, sae, data, home, at, on_step, stop)
            importance = importance_of_groups(latents, data.groups(sae))
            write_curves(home, curve_facts(planned))
            facts = {
                "seconds": recorder.seconds,
                "step_ms": recorder.step_ms,
                "peak_memory_mib": recorder.peak_memory_mib,
                "curve": recorder.curve().model_dump(),
                "importance": importance.model_dump() if importance else None,
            }
    with saved_at_once(home / "sae") as partial:
        sae.save_inference_model(partial)
    write_json(home / TRAINING, facts)
    shutil.rmtree(home / "checkpoints", ignore_errors=True)


def _fit(
    planned: PlannedRun,
    sae: TrainingSAE[Any],
    data: TrainingData,
    home: Path,
    points: list[int],
    on_step: OnStep,
    stop: StopFlag,
) -> tuple[CurveRecorder, LatentHistory]:
    checkpoint = any_checkpoint(home / "checkpoints")  # without one the run starts anew
    served = 0
    if checkpoint is not None:
        with reading(checkpoint):
            served = int(read_json(checkpoint / _POSITION_FILENAME)["batches"])
    batches = CountedBatches(data.batches(served), served)
    settings = planned.run.runner.to_sae_trainer_config()
    trainer: SAETrainer[Any, Any] = SAETrainer(settings, sae, batches)
    parameter, timer = planned.l0_parameter, StepTimer(sae.device)
    controller = L0Controller(trainer, parameter, planned.l0) if parameter.controlled else None
    recorder = CurveRecorder(trainer, points, timer, data.held_out(), controller)
    if checkpoint is not None:
        with reading(checkpoint):
            check_pickles(checkpoint)
            trainer.load_trainer_state(checkpoint)
            sae.load_weights_from_checkpoint(checkpoint)
            recorder.load(checkpoint)
    latents = LatentHistory(trainer, home, points, checkpoint)
    controllers = [] if controller is None else [controller]
    fit(
        trainer,
        stop,
        checkpoint,
        hooks=[
            timer,
            *controllers,
            recorder,
            latents,
            History(trainer, home, checkpoint),
            SavedPosition(batches),
            StepCallback(trainer, on_step),
        ],
        max_bad_batches=planned.run.max_bad_batches,
    )
    return recorder, latents
