"""The state of torch's global random number generators, from which synthetic data are drawn."""

from pathlib import Path
from typing import Any

import torch

RANDOM_STATE_FILENAME = "random_state.pt"


def save_random_state(folder: Path) -> None:
    """Write the random state of the CPU and of all GPUs into a checkpoint."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    torch.save(state, folder / RANDOM_STATE_FILENAME)


def load_random_state(folder: Path) -> None:
    """Restore the random state stored in a checkpoint, if it has one."""
    path = folder / RANDOM_STATE_FILENAME
    if not path.exists():  # a checkpoint of SAELens
        return
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
