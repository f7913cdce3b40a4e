"""The parents that ATM found in training. They are in its checkpoints, not in the saved SAE."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from safetensors import safe_open

from sae_lens_atm.training.checkpoints import any_checkpoint

_PARENTS = "parent_tracker.parents"


class FoundParents(NamedTuple):
    """Parents of each latent, shape ``(d_sae, most)``, padded with -1, and their checkpoint."""

    parents: NDArray[np.int64]
    checkpoint: str


def found_in_training(reference: str) -> FoundParents | None:
    """Return the parents in a checkpoint, or in the newest checkpoint of a run's folder.

    Args:
        reference: a folder, or an SAE on the Hub, which has no checkpoints.

    Returns:
        None if there is no checkpoint, or it has no parents.
    """
    folder = Path(reference)
    if not folder.is_dir():
        return None
    own = _parents_in(folder)
    if own is not None:
        return FoundParents(own, folder.name)
    checkpoint = any_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        return None
    found = _parents_in(checkpoint)
    return None if found is None else FoundParents(found, checkpoint.name)


def _parents_in(folder: Path) -> NDArray[np.int64] | None:
    path = folder / SAE_WEIGHTS_FILENAME
    if not path.is_file():
        return None
    with safe_open(path, framework="np") as tensors:
        if _PARENTS not in tensors.keys():  # noqa: SIM118
            return None
        parents = tensors.get_tensor(_PARENTS).astype(np.int64)
    return parents if (parents >= 0).any() else None
