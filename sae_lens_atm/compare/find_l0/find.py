"""Carry out the searches of a file.

A search trains SAEs as a comparison does: each is stored, and none is trained twice. The same call
therefore resumes a search that was stopped.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import mean

from sae_lens_atm.compare.find_l0.peak import highest, mean_curve
from sae_lens_atm.compare.find_l0.search import FoundL0, search
from sae_lens_atm.compare.find_l0.searches import Search, Searches, search_key
from sae_lens_atm.compare.plan.comparison_file import Comparison
from sae_lens_atm.compare.plan.l0_target import is_matched
from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.compare.report.results import Curve
from sae_lens_atm.compare.run.checks import check
from sae_lens_atm.compare.run.comparison import run_lists
from sae_lens_atm.compare.run.processes import Job, JobEvents, run_jobs
from sae_lens_atm.compare.run.stored_run import TRAINING
from sae_lens_atm.compare.run.tasks import make_jobs
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.files import locked, read_json, write_json
from sae_lens_atm.training.found_l0 import FILENAME, SCHEMA
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.preflight.checks import check_devices

OnRound = Callable[[str, Sequence[Job]], AbstractContextManager[JobEvents]]
"""Is called with the name of a round and its jobs, and shows their progress."""


def find_l0(
    searches: Searches,
    at_once: int,
    on_round: OnRound,
    stop: StopFlag | None = None,
    threads: int | None = None,
) -> dict[str, FoundL0]:
    """Carry out searches, and return the answer for each entry.

    The answers are written to `found_l0.json` in the output folder as they come.

    Args:
        searches: the searches.
        at_once: maximum number of processes.
        on_round: shows the progress.
        stop: flag to stop between training steps.
        threads: number of threads of each process; None divides the cores among the processes.

    Raises:
        Interrupted: a signal or `stop` stopped the search. The same call resumes it.
        SettingsError: a setting is wrong, or a run failed.
    """
    stop = stop or StopFlag()
    found: dict[str, FoundL0] = {}
    with stop.on_signals(), locked(searches.output):
        for one in searches.searches:

            def measure(
                length: float, l0s: Sequence[float], seeds: Sequence[int], one: Search = one
            ) -> dict[tuple[float, int], float]:
                comparison = one.comparison(length, l0s, seeds)
                show = partial(on_round, f"{one.entry}, {length:g} of the training")
                _train(comparison, at_once, show, stop, threads)
                return {
                    (p.l0, p.seed): _saved_bits(p, comparison.output) for p in comparison.planned
                }

            found[one.entry] = with_l0_checked(search(measure, one.seeds, one.limits), one)
            _write(searches, found)
        shutil.rmtree(searches.output / "pools", ignore_errors=True)
    return found


def _train(
    comparison: Comparison,
    at_once: int,
    show: Callable[[Sequence[Job]], AbstractContextManager[JobEvents]],
    stop: StopFlag,
    threads: int | None,
) -> None:
    check(comparison)
    for planned in comparison.planned:
        check_devices(planned.run)
    lists = make_jobs(comparison, evaluate=False)
    with show([job for jobs in lists for job in jobs]) as events:
        failed = run_lists(lists, lambda jobs: run_jobs(jobs, at_once, events, stop, threads))
    if failed:
        raise SettingsError("\n".join(f"{label}: {error}" for label, error in failed.items()))


def _saved_bits(planned: PlannedRun, folder: Path) -> float:
    facts = read_json(folder / planned.folder / TRAINING)
    saved = Curve.model_validate(facts["curve"]).saved_bits
    if not saved:
        raise SettingsError(
            f"{folder / planned.folder} has no saved bits: an older version trained this SAE. "
            f"Delete {folder} and search again"
        )
    if saved[-1] is None:
        raise SettingsError(
            f"{folder / planned.folder}: saved bits are not a number. Either the SAE has diverged "
            "(lower lr), or a held-out sample is not finite"
        )
    return saved[-1]


def with_l0_checked(answer: FoundL0, one: Search) -> FoundL0:
    """Return the answer with a problem more if the SAEs at the highest point have another L0.

    Architectures whose L0 follows from a coefficient can miss their target in a short training.
    """
    last = answer.rounds[-1]
    target = highest(mean_curve(last.values))
    comparison = one.comparison(last.length, [target], sorted(last.values[target]))
    stored = [read_json(comparison.output / p.folder / TRAINING) for p in comparison.planned]
    l0 = mean(facts["curve"]["l0"][-1] for facts in stored)
    if is_matched(l0, target):
        return answer
    problem = f"at L0 {target:g} the SAEs have L0 {l0:.3g}: train longer"
    return answer.model_copy(update={"problems": [*answer.problems, problem]})


def _write(searches: Searches, found: Mapping[str, FoundL0]) -> None:
    """Write the answers beside those of earlier calls. Their keys say what they are valid for."""
    path = searches.output / FILENAME
    stored = read_json(path)
    earlier = stored if stored.get("schema") == SCHEMA else {"keys": {}, "entries": {}}
    keys = {one.entry: search_key(one) for one in searches.searches if one.entry in found}
    entries = {name: answer.model_dump() for name, answer in found.items()}
    write_json(
        path,
        {
            "schema": SCHEMA,
            "name": searches.name,
            "keys": earlier["keys"] | keys,
            "entries": earlier["entries"] | entries,
        },
    )
