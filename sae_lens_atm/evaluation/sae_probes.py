"""Sparse probing of an SAE on the tasks of sae-probes, and a probe of the model's activations."""

from statistics import fmean
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor

from sae_lens_atm.evaluation.recovered_loss import OnBatch, ignore_batch
from sae_lens_atm.evaluation.task_store import TaskStore
from sae_lens_atm.metrics.sparse_probing import (
    ProbeScores,
    interval_over_tasks,
    latents_by_difference,
    probe_scores,
)

_ROWS_IN_BATCH = 512


class Probing(NamedTuple):
    """The scores of an SAE on tasks."""

    tasks: list[str]
    by_task: dict[str, list[float]]
    """For each score, such as `probe_auc_k1`, its values on the tasks."""
    seed: int

    @property
    def figures(self) -> dict[str, float]:
        """The means over tasks. F1 is left out: on balanced classes it is close to accuracy."""
        return {n: fmean(values) for n, values in self.by_task.items() if "_f1_" not in n}

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95% intervals of the means, over resampled tasks."""
        return {name: interval_over_tasks(self.by_task[name], self.seed) for name in self.figures}


def probe_sae(sae: SAE[Any], store: TaskStore, on_task: OnBatch = ignore_batch) -> Probing:
    """Probe an SAE on all tasks of a store.

    Args:
        sae: an SAE, trained at the hook where the activations were read.
        store: activations, all of them stored.
        on_task: is called before each task, with the tasks done and all of them. It may raise.
    """
    by_task: dict[str, list[float]] = {}
    for done, task in enumerate(store.tasks):
        on_task(done, len(store.tasks))
        scores = {f"k{k}": found for k, found in _probes_of_latents(sae, store, task).items()}
        for which, found in {**scores, "raw": store.raw_scores(task)}.items():
            for score, value in found._asdict().items():
                by_task.setdefault(f"probe_{score}_{which}", []).append(value)
    return Probing(store.tasks, by_task, store.cfg.seed)


def _probes_of_latents(sae: SAE[Any], store: TaskStore, task: str) -> dict[int, ProbeScores]:
    """Return the scores of probes on the k latents that differ most between the classes."""
    found, cfg = store.read(task), store.cfg
    train = _encode(sae, found.train)
    order = latents_by_difference(train, torch.from_numpy(found.train_labels))[: max(cfg.k)]
    train, test = train[:, order], _encode(sae, found.test, order)
    return {
        k: probe_scores(
            train[:, :k], found.train_labels, test[:, :k], found.test_labels, "l1", cfg.seed
        )
        for k in cfg.k
    }


@torch.no_grad()
def _encode(sae: SAE[Any], x: Tensor, latents: Tensor | None = None) -> Tensor:
    """Return activations on the CPU in float32, of all latents or of some."""
    acts = (
        sae.encode(part.to(sae.device, sae.dtype)).to_dense() for part in x.split(_ROWS_IN_BATCH)
    )
    rows = (part.float().cpu() for part in acts)
    return torch.cat([part if latents is None else part[:, latents] for part in rows])
