"""Jobs in which a language model reads texts for the evaluation, once for all runs."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.compare.run.processes import Job, OnProgress, Work
from sae_lens_atm.evaluation.recovered_loss import OnBatch
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.phases import LOADING_MODEL, Phase
from sae_lens_atm.training.run_file import LanguageModelRun

PERCENT = 100
"""Steps of such a job. Its number of batches is not known before the texts are read."""


def activations_folder(planned: PlannedRun, folder: Path) -> Path:
    """Return where activations for evaluations are stored: with the cache, or the comparison."""
    activations = cast(LanguageModelRun, planned.run).activations
    return folder if activations is None else activations.folder


def jobs_of_models(
    what: str,
    left: Iterable[PlannedRun],
    is_needed: Callable[[PlannedRun], bool],
    work: Callable[[PlannedRun], Work],
) -> list[Job]:
    """Return a job for each language model that must still read something.

    Args:
        what: what it reads, for messages.
        left: the runs that are not evaluated yet.
        is_needed: returns whether the model of a run must read.
        work: returns the work for the model of a run.
    """
    firsts: dict[int | None, PlannedRun] = {}
    for planned in left:
        firsts.setdefault(planned.model_seed, planned)
    return [
        Job(what if seed is None else f"{what}, model {seed}", PERCENT, work(planned), needed=True)
        for seed, planned in firsts.items()
        if is_needed(planned)
    ]


def watched(on_progress: OnProgress, stop: StopFlag, unit: str) -> OnBatch:
    """Return a callback for batches that reports the progress and stops on request.

    Args:
        on_progress: gets the progress in hundredths, and as a phase.
        stop: the request to stop.
        unit: what the batches are counted in.
    """
    reported = 0
    on_progress(Phase(LOADING_MODEL))

    def on_batch(done: int, every: int) -> None:
        nonlocal reported
        percent = PERCENT * done // max(every, 1)
        if percent > reported:
            on_progress(percent - reported)
            reported = percent
        on_progress(Phase("reading", done, every, unit))
        stop.check()

    return on_batch
