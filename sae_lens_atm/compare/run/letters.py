"""The first letters of the language models of a comparison, which its runs share."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, cast

from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.compare.run.processes import Job, OnProgress
from sae_lens_atm.compare.run.reading import activations_folder, jobs_of_models, watched
from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.evaluation.first_letters import FirstLetters
from sae_lens_atm.evaluation.letter_store import are_stored, first_letters_of
from sae_lens_atm.evaluation.recovered_loss import OnBatch, ignore_batch
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.run_file import LanguageModelRun


def _read_words(planned: PlannedRun, folder: Path, on_progress: OnProgress, stop: StopFlag) -> None:
    on_batch = watched(on_progress, stop, "batches of prompts")
    first_letters(planned, folder, on_batch=on_batch)


def letter_jobs(left: Iterable[PlannedRun], folder: Path) -> list[Job]:
    """Return a job for each language model whose first letters are needed and not stored.

    Args:
        left: the runs that are not evaluated yet.
        folder: the folder of the comparison.
    """
    return jobs_of_models(
        "first letters",
        left,
        lambda planned: not has_letters(planned, folder),
        lambda planned: partial(_read_words, planned, folder),
    )


def has_letters(planned: PlannedRun, folder: Path) -> bool:
    """Return whether a run needs no first letters, or they are stored."""
    cfg, run = planned.first_letters, cast(LanguageModelRun, planned.run).runner
    return cfg is None or are_stored(run, cfg, activations_folder(planned, folder))


def first_letters(
    planned: PlannedRun,
    folder: Path,
    load: Callable[[], Any] | None = None,
    on_batch: OnBatch = ignore_batch,
) -> FirstLetters | None:
    """Return the first letters of a run's language model, or None if the run needs none.

    Args:
        planned: the run.
        folder: the folder of the comparison.
        load: returns the language model. By default it is loaded if it is needed.
        on_batch: is called before each batch of prompts. It may raise to stop.
    """
    cfg, run = planned.first_letters, cast(LanguageModelRun, planned.run).runner
    if cfg is None:
        return None
    load = load or (lambda: load_language_model(run))
    return first_letters_of(run, cfg, load, activations_folder(planned, folder), on_batch)
