"""The binary tasks of the package sae-probes: texts of two classes.

The package is not imported: that needs xgboost, and reads all its files.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.metrics.sparse_probing import Labels

PACKAGE = "sae-probes"
_NEEDED = {"sae_probes": PACKAGE, "sklearn": "scikit-learn", "zstandard": "zstandard"}


class ProbingTask(NamedTuple):
    """A task of sae-probes."""

    texts: list[str]
    labels: Labels
    """0 or 1 for each text."""


def check_installed() -> None:
    """Check that sae-probes and scikit-learn are installed. Nothing is imported.

    Raises:
        SettingsError: they are not. The message says what to install.
    """
    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise SettingsError(
            f"sae_probes needs {' and '.join(missing)}: run pip install 'sae-lens-atm[probes]'"
        )


def installed_version() -> str:
    """Return the version of sae-probes."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return "unknown"


@cache
def task_names() -> list[str]:
    """Return the names of all binary tasks, in the order of sae-probes."""
    tasks = _read("probing_datasets_MASTER.csv.zst")
    files: list[str] = tasks["Dataset save name"][tasks["Data type"] == "Binary Classification"]
    return [Path(file).stem for file in files]


def choose_tasks(wanted: int | Sequence[str] | Literal["all"]) -> list[str]:
    """Return names of tasks: all, so many at even distances, or those in a list.

    Raises:
        SettingsError: sae-probes is not installed, or has no task of a name.
    """
    check_installed()
    every = task_names()
    if wanted == "all":
        return every
    if isinstance(wanted, int):
        number = min(wanted, len(every))
        return [every[i * len(every) // number] for i in range(number)]
    for name in wanted:
        if name not in every:
            close = get_close_matches(name, every, n=1)
            hint = f", did you mean {close[0]!r}?" if close else ""
            raise SettingsError(f"sae_probes.tasks: {PACKAGE} has no task {name!r}{hint}")
    return list(wanted)


def read_task(name: str) -> ProbingTask:
    """Return the texts and labels of a task."""
    table = _read(f"cleaned_data/{name}.csv.zst")
    _, labels = np.unique(table["target"].to_numpy(), return_inverse=True)
    return ProbingTask(table["prompt"].tolist(), labels.astype(np.int64))


def _read(file: str) -> Any:
    spec = find_spec("sae_probes")
    assert spec is not None
    assert spec.origin is not None
    return pd.read_csv(Path(spec.origin).parent / "data" / file, compression="zstd")
