"""The first letters of the language models of a comparison, which its runs share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.evaluation.first_letters import FirstLetters
from sae_lens_atm.evaluation.letter_store import are_stored, first_letters_of
from sae_lens_atm.evaluation.recovered_loss import OnBatch
from sae_lens_atm.training.run_file import LanguageModelRun

PERCENT = 100
"""Steps of the work, whose number of batches is not known before the vocabulary is read."""


def activations_folder(planned: PlannedRun, folder: Path) -> Path:
    """Return where activations for evaluations are stored: with the cache, or the comparison."""
    activations = cast(LanguageModelRun, planned.run).activations
    return folder if activations is None else activations.folder


def has_letters(planned: PlannedRun, folder: Path) -> bool:
    """Return whether a run needs no first letters, or they are stored."""
    cfg, run = planned.first_letters, cast(LanguageModelRun, planned.run).runner
    return cfg is None or are_stored(run, cfg, activations_folder(planned, folder))


def first_letters(
    planned: PlannedRun,
    folder: Path,
    load: Callable[[], Any] | None = None,
    on_batch: OnBatch | None = None,
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


def in_percent(report: Callable[[int], None]) -> OnBatch:
    """Return a callback for batches that reports the progress in hundredths of the work."""
    reported = 0

    def on_batch(done: int, batches: int) -> None:
        nonlocal reported
        percent = PERCENT * done // max(batches, 1)
        if percent > reported:
            report(percent - reported)
            reported = percent

    return on_batch
