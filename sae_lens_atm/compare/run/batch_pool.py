"""The data of a seed: a synthetic model, and a file of batches that all SAEs of the seed read."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from sae_lens.synthetic import SyntheticModel
from sae_lens.util import temporary_seed
from torch import Tensor

from sae_lens_atm.training.run_file import SyntheticRun
from sae_lens_atm.training.synthetic_run import build_synthetic_model

POOL_GIB = 8.0
"""Size above which a pool is not stored. Each run then draws the same batches again."""
_VALUE_BYTES = 4


def synthetic_model(run: SyntheticRun, folder: Path) -> SyntheticModel:
    """Return the synthetic model of a run.

    A model that is slow to make is stored in the comparison's folder by the first call.
    """
    stored = model_folder(run, folder)
    if stored is None:
        return build_synthetic_model(run)
    if not stored.exists():
        partial = stored.with_name(f".{stored.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        build_synthetic_model(run).save(partial)
        partial.rename(stored)
    return SyntheticModel.load_from_disk(stored, run.runner.device)


def model_folder(run: SyntheticRun, folder: Path) -> Path | None:
    """Return the folder of the stored synthetic model, or None for a model that is not stored."""
    config = run.runner.synthetic_model
    if run.hierarchy is not None or isinstance(config, str):
        return None
    text = json.dumps(config.to_dict(), sort_keys=True)
    return folder / "models" / hashlib.sha256(text.encode()).hexdigest()[:10]


def batch_seed(seed: int, step: int) -> int:
    """Return the seed of the batch of a step.

    It depends on the run's seed and the step alone. So every run can draw any batch, in any order,
    also after an interruption.
    """
    digest = hashlib.sha256(f"batch {seed} {step}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def draw_batch(model: SyntheticModel, size: int, seed: int, step: int) -> Tensor:
    """Draw the activations of a step, ``(size, d_in)``. The global random state is restored."""
    with temporary_seed(batch_seed(seed, step)):
        return model.sample(size)


class Pool:
    """The batches of one seed in one file: float32, ``(batches, batch_size, d_in)``.

    A training with more steps than batches reads them again from the start.
    """

    def __init__(self, path: Path, batches: int, batch_size: int, d_in: int) -> None:
        self.path = path
        self.shape = (batches, batch_size, d_in)

    @property
    def gib(self) -> float:
        """Size of the file in GiB."""
        return float(np.prod(self.shape, dtype=np.float64)) * _VALUE_BYTES / 2**30

    @property
    def is_worth_keeping(self) -> bool:
        """Whether the file is small enough to be stored."""
        return self.gib <= POOL_GIB

    def draw(self, model: SyntheticModel, seed: int) -> Iterator[int]:
        """Write every batch to a temporary file, yielding its index, then rename the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        values = np.memmap(partial, np.float32, "w+", shape=self.shape)
        for step in range(self.shape[0]):
            values[step] = draw_batch(model, self.shape[1], seed, step).float().cpu().numpy()
            yield step
        values.flush()
        partial.replace(self.path)

    def read(self, first: int = 0) -> Iterator[Tensor]:
        """Yield the batches from step `first` on, without end."""
        size = self.shape[1] * self.shape[2]
        with self.path.open("rb") as file:  # a memory map would count as memory of the run
            for step in count(first):
                file.seek(step % self.shape[0] * size * _VALUE_BYTES)
                yield torch.from_numpy(np.fromfile(file, np.float32, size).reshape(self.shape[1:]))

    def redraw(self, model: SyntheticModel, seed: int, first: int = 0) -> Iterator[Tensor]:
        """Yield the same batches without the file."""
        for step in count(first):
            yield draw_batch(model, self.shape[1], seed, step % self.shape[0])
