"""The tasks of sae-probes in a comparison: activations of the model once, then each SAE."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

from sae_lens import SAE

from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.compare.run.processes import Job, OnProgress
from sae_lens_atm.compare.run.reading import activations_folder, jobs_of_models, watched
from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.evaluation.recovered_loss import OnBatch
from sae_lens_atm.evaluation.sae_probes import probe_sae
from sae_lens_atm.evaluation.task_store import TaskStore
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.run_file import LanguageModelRun


def _read_tasks(planned: PlannedRun, folder: Path, on_progress: OnProgress, stop: StopFlag) -> None:
    on_batch = watched(on_progress, stop, "characters")
    cfg = cast(LanguageModelRun, planned.run).runner
    task_store(planned, folder).fill(lambda: load_language_model(cfg), on_batch)


def task_store(planned: PlannedRun, folder: Path) -> TaskStore:
    """Return the store of the activations that an SAE is probed on.

    Args:
        planned: a run with `sae_probes`.
        folder: the folder of the comparison.

    Raises:
        SettingsError: sae-probes is not installed, or has no task of a name.
    """
    assert planned.sae_probes is not None
    run = cast(LanguageModelRun, planned.run).runner
    return TaskStore(run, planned.sae_probes, activations_folder(planned, folder))


def probing_jobs(left: Iterable[PlannedRun], folder: Path) -> list[Job]:
    """Return a job for each language model whose activations are not stored yet.

    Args:
        left: the runs that are not evaluated yet.
        folder: the folder of the comparison.
    """

    def is_needed(planned: PlannedRun) -> bool:
        return planned.sae_probes is not None and bool(task_store(planned, folder).missing())

    return jobs_of_models(
        "probing tasks", left, is_needed, lambda p: partial(_read_tasks, p, folder)
    )


def add_probing(
    content: dict[str, Any],
    planned: PlannedRun,
    folder: Path,
    sae: SAE[Any],
    load: Callable[[], Any],
    on_task: OnBatch,
) -> None:
    """Probe an SAE on the tasks, and add what was found to the content of its file of figures.

    Args:
        content: the content. Figures, their intervals and the values on each task are added.
        planned: the run of the SAE. Without `sae_probes` nothing is done.
        folder: the folder of the comparison.
        sae: the SAE.
        load: returns the language model. It is called only if activations are not stored.
        on_task: is called before each task. It may raise an error to stop.
    """
    if planned.sae_probes is None:
        return
    store = task_store(planned, folder)
    store.fill(load, lambda _done, _every: on_task(0, 0))
    found = probe_sae(sae, store, on_task)
    content["figures"] |= found.figures
    content["intervals"] = content.get("intervals", {}) | found.intervals
    content |= {"tasks": found.tasks, "by_task": found.by_task}
