"""The stored states of stopped groups, and which runs continue from which of them."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.errors import CheckpointError
from sae_lens_atm.files import restore_replaced
from sae_lens_atm.training.checkpoints import check_pickles, reading

_STATE = "stopped"


@dataclass
class Part:
    """Runs of one seed that are trained together."""

    runs: list[PlannedRun]
    saved: Path
    """Where their state is saved if they are stopped."""
    resumed: Path | None = None
    """The state that they continue from. It may have other runs, too."""

    def remove_states(self) -> None:
        """Remove all states of the runs, after their SAEs were stored."""
        groups = self.saved.parents[1]
        for state in [state for run in self.runs for state in groups.glob(f"*/*/{run.name}")]:
            shutil.rmtree(state)
            if not any(path.is_dir() for path in state.parent.iterdir()):
                shutil.rmtree(state.parents[1])


def parts_to_train(runs: Sequence[PlannedRun], folder: Path) -> list[Part]:
    """Group runs by the saved state from which they continue. Those without one start anew.

    A state that cannot be read is passed over.

    Args:
        runs: the runs to train.
        folder: the folder of the comparison.
    """
    groups, left, parts = folder / "groups", list(runs), list[Part]()
    # Other processes write the states of other seeds at the same time.
    homes = [home for home in groups.glob("*") if any(_has(home, run) for run in runs)]
    for home in homes:
        restore_replaced(home)
    states = [home / _STATE for home in homes if (home / _STATE).exists()]
    for state in sorted(states, key=lambda path: path.stat().st_mtime, reverse=True):
        stored = [run for run in left if _is_readable(state, run)]
        if stored:
            parts.append(Part(stored, _saved(groups, stored), state))
            left = [run for run in left if run not in stored]
    return [*parts, *([Part(left, _saved(groups, left))] if left else [])]


def _has(home: Path, run: PlannedRun) -> bool:
    return any(home.glob(f"*/{run.name}"))


def _is_readable(state: Path, run: PlannedRun) -> bool:
    if not (state / run.name).exists():
        return False
    try:
        with reading(state):
            check_pickles(state / run.name)
    except CheckpointError:
        return False
    return True


def _saved(groups: Path, runs: Sequence[PlannedRun]) -> Path:
    names = " ".join(sorted(run.name for run in runs))
    return groups / hashlib.sha256(names.encode()).hexdigest()[:10] / _STATE
