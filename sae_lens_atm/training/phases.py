"""The progress of work other than training steps: loading, filling, evaluating, writing."""

from collections.abc import Callable
from typing import NamedTuple

LOADING_MODEL = "loading the language model"
LOADING_MODEL_AND_DATASET = "loading the language model and the dataset"


class Phase(NamedTuple):
    """The progress of some work other than training steps."""

    what: str
    done: int = 0
    total: int = 0
    """0 if it is unknown."""
    unit: str = ""
    """What is counted."""

    @property
    def is_finished(self) -> bool:
        """Whether all of it is done."""
        return 0 < self.total <= self.done

    def __str__(self) -> str:
        if not self.total:
            return self.what
        done = "" if self.is_finished else f"{self.done:,} of "
        return f"{self.what}: {done}{self.total:,} {self.unit}"


OnPhase = Callable[[Phase], None]
"""Is called often with the phase at the time."""


def ignore_phase(_: Phase) -> None:
    """Do nothing."""
