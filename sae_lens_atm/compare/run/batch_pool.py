"""What all SAEs of one seed are trained on: a synthetic model, and batches of it that are drawn
once, kept in a file, and read by all."""

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
"""A pool larger than this is not kept: each run then draws the same batches again."""
_VALUE_BYTES = 4


def synthetic_model(run: SyntheticRun, folder: Path) -> SyntheticModel:
    """The synthetic model of a run. One that takes long to make is made once and kept."""
    kept = kept_model(run, folder)
    if kept is None:
        return build_synthetic_model(run)
    if not kept.exists():
        partial = kept.with_name(f".{kept.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        build_synthetic_model(run).save(partial)
        partial.rename(kept)
    return SyntheticModel.load_from_disk(kept, run.runner.device)


def kept_model(run: SyntheticRun, folder: Path) -> Path | None:
    """Where that model is kept; None if there is no need to."""
    config = run.runner.synthetic_model
    if run.hierarchy is not None or isinstance(config, str):
        return None
    text = json.dumps(config.to_dict(), sort_keys=True)
    return folder / "models" / hashlib.sha256(text.encode()).hexdigest()[:10]


def batch_seed(seed: int, step: int) -> int:
    """The seed of the batch of a step: a function of both alone, so that any run can draw any
    batch, in any order, before or after an interruption."""
    digest = hashlib.sha256(f"batch {seed} {step}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def draw_batch(model: SyntheticModel, size: int, seed: int, step: int) -> Tensor:
    """One batch of activations; the global random state is left as it was."""
    with temporary_seed(batch_seed(seed, step)):
        return model.sample(size)


class Pool:
    """The batches of one seed in one file: float32, ``(batches, batch_size, d_in)``. A training of
    more steps than there are batches goes through them again."""

    def __init__(self, path: Path, batches: int, batch_size: int, d_in: int) -> None:
        self.path = path
        self.shape = (batches, batch_size, d_in)

    @property
    def gib(self) -> float:
        return float(np.prod(self.shape, dtype=np.float64)) * _VALUE_BYTES / 2**30

    @property
    def is_worth_keeping(self) -> bool:
        return self.gib <= POOL_GIB

    def draw(self, model: SyntheticModel, seed: int) -> Iterator[int]:
        """Draw every batch into the file, yielding each one done. Complete when named."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.partial")
        values = np.memmap(partial, np.float32, "w+", shape=self.shape)
        for step in range(self.shape[0]):
            values[step] = draw_batch(model, self.shape[1], seed, step).float().cpu().numpy()
            yield step
        values.flush()
        partial.replace(self.path)

    def read(self, first: int = 0) -> Iterator[Tensor]:
        """The batches from step `first` on, without end."""
        size = self.shape[1] * self.shape[2]
        with self.path.open("rb") as file:  # a map of it would count as memory of the run
            for step in count(first):
                file.seek(step % self.shape[0] * size * _VALUE_BYTES)
                yield torch.from_numpy(np.fromfile(file, np.float32, size).reshape(self.shape[1:]))

    def redraw(self, model: SyntheticModel, seed: int, first: int = 0) -> Iterator[Tensor]:
        """The same batches, where the file is not there."""
        for step in count(first):
            yield draw_batch(model, self.shape[1], seed, step % self.shape[0])
