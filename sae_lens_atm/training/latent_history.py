"""Importance and masking of each latent over the steps of a run, in `latents.safetensors`."""

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer
from sae_lens.saes.sae import TrainStepOutput
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.errors import SaveError
from sae_lens_atm.files import saved_at_once
from sae_lens_atm.sae.atm_sae import ATMTrainingSAE
from sae_lens_atm.training.supervise import Hook

LATENTS_FILENAME = "latents.safetensors"
POINTS = 40
"""Number of recorded steps of a run."""


class LatentHistory(Hook):
    """Records importance, mask probability and threshold of an ATM SAE after some steps.

    They are those of the mask that the next step draws.

    A checkpoint holds what was recorded up to its step. The folder of the run holds all of it from
    the last step on. SAEs without importance have no such file.

    Args:
        trainer: the trainer to observe.
        folder: the folder of the run.
        points: numbers of steps after which to record, see `curve_points`.
        checkpoint: the checkpoint from which the run resumes.
    """

    def __init__(
        self,
        trainer: SAETrainer[Any, Any],
        folder: Path,
        points: list[int],
        checkpoint: Path | None = None,
    ) -> None:
        self._trainer, self._folder = trainer, folder
        self._points, self._last = set(points), max(points, default=0)
        self.steps: list[int] = []
        self._importance: list[Tensor] = []
        self._probability: list[Tensor] = []
        self._threshold: list[Tensor] = []
        seen = None if checkpoint is None else read_latent_history(checkpoint)
        with suppress(OSError):  # of an earlier run in this folder
            (folder / LATENTS_FILENAME).unlink(missing_ok=True)
        if seen is not None:
            self.steps = seen["steps"].tolist()
            self._importance = list(seen["importance"])
            self._probability = list(seen["mask_probability"])
            self._threshold = list(seen["threshold"])

    @property
    def importance(self) -> Tensor:
        """Importance at the recorded steps, shape ``(steps, d_sae)``."""
        return torch.stack(self._importance)

    @property
    def thresholds(self) -> list[float]:
        """Threshold of the importance at the recorded steps."""
        return [float(threshold) for threshold in self._threshold]

    @override
    def after_step(self, output: TrainStepOutput) -> None:
        step, sae = self._trainer.n_training_steps + 1, self._trainer.sae
        if step not in self._points or not isinstance(sae, ATMTrainingSAE):
            return
        mask = sae.draw_mask()
        self.steps.append(step)
        self._importance.append(mask.importance.detach().float().cpu())
        self._probability.append(mask.probability.detach().half().cpu())
        self._threshold.append(mask.threshold.detach().float().cpu())
        if step == self._last:
            try:
                with saved_at_once(self._folder) as partial:
                    self.on_checkpoint(partial)
            except SaveError as error:  # the run is worth more than its history
                warnings.warn(str(error), stacklevel=2)

    @override
    def on_checkpoint(self, folder: Path) -> None:
        if not self.steps:
            return
        tensors = {
            "steps": torch.tensor(self.steps),
            "importance": self.importance,
            "mask_probability": torch.stack(self._probability),
            "threshold": torch.stack(self._threshold),
        }
        save_file(tensors, folder / LATENTS_FILENAME)


def read_latent_history(folder: Path) -> dict[str, Tensor] | None:
    """Return ``steps``, ``importance``, ``mask_probability`` and ``threshold``, stacked over steps.

    Args:
        folder: the folder of a run, or a checkpoint.

    Returns:
        None if there is no such file, or it is damaged.
    """
    path = folder / LATENTS_FILENAME
    try:
        return load_file(path) if path.is_file() else None
    except (OSError, SafetensorError):
        return None


def curve_points(steps: int, points: int = POINTS) -> list[int]:
    """Return evenly spaced numbers of steps, up to the last step."""
    return sorted({max(round(steps * i / points), 1) for i in range(1, points + 1)})
