"""Importance and masking of the latents over training, from the folder of a run or checkpoint."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_atm.training.checkpoints import any_checkpoint
from sae_lens_atm.training.latent_history import read_latent_history

LEVELS = 255
LOWEST, HIGHEST = -4.0, 3.0
"""Logarithms to base 10 of the importance of level 1, and of the last level."""


class OverTraining(NamedTuple):
    """Each figure of shape ``(d_sae, points)``, in levels, to save space in the page."""

    steps: NDArray[np.uint32]
    importance: NDArray[np.uint8]
    """Levels from 1 to `LEVELS` of the logarithm, from `LOWEST` to `HIGHEST`. 0 is none at all."""
    masked: NDArray[np.uint8]
    """Probability of being masked, in 1/`LEVELS`."""
    threshold: NDArray[np.float32]
    """The threshold of the importance, shape ``(points,)``."""
    lowest: float = LOWEST
    highest: float = HIGHEST


def over_training(reference: str) -> OverTraining | None:
    """Return what a run recorded of its latents.

    Args:
        reference: the folder of a run, its SAE in ``sae``, or a checkpoint. A run that is not
            finished has the record in its newest checkpoint. An SAE on the Hub has none.

    Returns:
        None if nothing was recorded, as for SAEs without masks.
    """
    folder = Path(reference).resolve()
    if not folder.is_dir():
        return None
    if folder.name == "sae":
        folder = folder.parent
    found = read_latent_history(folder)
    if found is None and (checkpoint := any_checkpoint(folder / "checkpoints")) is not None:
        found = read_latent_history(checkpoint)
    return None if found is None else _in_levels(found)


def _in_levels(found: dict[str, Tensor]) -> OverTraining:
    importance = found["importance"].T.double().numpy()
    with np.errstate(divide="ignore"):
        share = (np.log10(importance) - LOWEST) / (HIGHEST - LOWEST)
    levels = np.round(1 + share.clip(0, 1) * (LEVELS - 1)) * (importance > 0)
    masked = np.round(found["mask_probability"].T.float().numpy() * LEVELS)
    return OverTraining(
        found["steps"].numpy().astype(np.uint32),
        levels.astype(np.uint8),
        masked.astype(np.uint8),
        found["threshold"].float().numpy(),
    )
