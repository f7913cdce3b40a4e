"""This process among those that torchrun has started for one training."""

import os


def size() -> int:
    """Return the number of processes of this training, as torchrun sets it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """Return the rank of this process. Rank 0 writes all files."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def is_main_of_node() -> bool:
    """Return whether this process reports the errors that all processes of its machine have."""
    return size() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
