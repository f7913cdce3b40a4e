"""The history of a run: figures of the training steps, in `history.jsonl`."""

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens import SAE, SAETrainer
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.files import write_text
from sae_lens_atm.sae.forward_pass import mean_l0
from sae_lens_atm.training.supervise import Hook, Step

HISTORY_FILENAME = "history.jsonl"
ROWS = 1000
"""Maximum number of rows of a run."""
L0_TOLERANCE = 0.05
"""Relative difference of L0 between the saved SAE and training above which to warn."""


def step_figures(trainer: SAETrainer[Any, Any], output: TrainStepOutput) -> dict[str, float]:
    """Return figures of a training step and its batch. It waits once for the device.

    ``dead_latents`` is the number of latents that fire on no sample of the last
    ``dead_feature_window`` steps. ``explained_variance`` is of the activations as the SAE gets
    them, scaled or whitened. SAEs without masks have no ``masked_fraction``.
    """
    figures: dict[str, Any] = {
        "loss": output.loss,
        "l0": mean_l0(output.feature_acts),
        "explained_variance": _explained_variance(output.sae_in, output.sae_out),
        "dead_latents": trainer.dead_neurons.sum(),
    }
    masked = output.metrics.get("masked_fraction")
    if callable(masked):
        figures["masked_fraction"] = masked()
    values = torch.stack([value.detach().float() for value in figures.values()]).tolist()
    return dict(zip(figures, values, strict=True))


@torch.no_grad()
def _explained_variance(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Return 1 minus the squared error over the variance, as SAELens' trainer logs it."""
    x, reconstruction = x.float(), reconstruction.float()
    error = (x - reconstruction).square().sum(-1).mean()
    return 1 - error / (x - x.mean(0)).square().sum(-1).mean()


class History(Hook):
    """Writes a row of figures for at most `ROWS` of the steps, while training; also to wandb.

    A checkpoint holds the rows up to its step. A resumed run continues behind them, so that its
    history is the one of a run without stops.

    Args:
        trainer: the trainer to observe.
        folder: where `history.jsonl` is written.
        checkpoint: the checkpoint from which the run resumes.
    """

    def __init__(
        self, trainer: SAETrainer[Any, Any], folder: Path, checkpoint: Path | None = None
    ) -> None:
        self._trainer, self._path = trainer, folder / HISTORY_FILENAME
        self._every = -(-trainer.cfg.total_training_steps // ROWS)
        self._failed = False
        stored = None if checkpoint is None else checkpoint / HISTORY_FILENAME
        folder.mkdir(parents=True, exist_ok=True)
        if stored is not None and stored.exists():
            shutil.copyfile(stored, self._path)
        else:  # a new run, or a checkpoint of an older version
            write_text(self._path, "")

    @override
    def after_step(self, output: TrainStepOutput) -> None:
        trainer = self._trainer
        step = trainer.n_training_steps + 1
        if step % self._every:
            return
        figures = step_figures(trainer, output)
        row = {"step": step, "samples": trainer.n_training_samples, "dead_latents": 0, **figures}
        row["dead_latents"] = int(figures["dead_latents"])
        if trainer.cfg.logger.log_to_wandb and wandb.run is not None:
            wandb.log(figures, step=trainer.n_training_steps)  # SAELens' own number of the step
        values = {name: value if math.isfinite(value) else None for name, value in row.items()}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:  # the run is worth more than its history
            if not self._failed:
                self._failed = True
                warnings.warn(f"cannot write {self._path}: {error.strerror}", stacklevel=2)

    @override
    def on_checkpoint(self, folder: Path) -> None:
        if self._path.exists():
            shutil.copyfile(self._path, folder / HISTORY_FILENAME)


class LastBatch(Hook):
    """Keeps the last batch of a run, on which the saved SAE is compared with training."""

    def __init__(self) -> None:
        self.trainer: SAETrainer[Any, Any] | None = None
        self._batch = torch.empty(0)
        self.training_l0 = float("nan")
        """Mean L0 of the batch in training; NaN if no step was taken."""

    @override
    def wrap_step(self, step: Step) -> Step:
        def step_and_keep_batch(batch: Tensor) -> TrainStepOutput:
            output, trainer = step(batch), self.trainer
            if trainer and trainer.n_training_samples >= trainer.cfg.total_training_samples:
                self._batch, self.training_l0 = batch, float(mean_l0(output.feature_acts))
            return output

        return step_and_keep_batch

    @torch.no_grad()
    def saved_l0(self, folder: Path, device: str) -> float:
        """Return the mean L0 of the same batch under the SAE that is saved in a folder."""
        if math.isnan(self.training_l0):
            return float("nan")
        sae = SAE[Any].load_from_disk(folder, device=device)
        x = self._batch.to(sae.device, sae.dtype)
        l0 = float(mean_l0(sae.encode(x)))
        if abs(l0 - self.training_l0) > L0_TOLERANCE * self.training_l0:
            warnings.warn(
                f"L0 of the saved SAE is {l0:.1f}, but {self.training_l0:.1f} in training on the "
                "same batch: its thresholds have not settled, train longer",
                stacklevel=2,
            )
        return l0
