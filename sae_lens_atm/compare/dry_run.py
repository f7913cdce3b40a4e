"""The plan of a comparison, and an estimate of its time from a few timed steps."""

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from sae_lens_atm.compare.language_model_time import ModelTime, time_language_model
from sae_lens_atm.compare.plan.comparison_file import Comparison
from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.compare.run.batch_pool import model_folder, synthetic_model
from sae_lens_atm.compare.run.checks import check
from sae_lens_atm.compare.run.processes import threads_per_job
from sae_lens_atm.compare.run.stored_run import is_trained
from sae_lens_atm.compare.run.synthetic import pool_of
from sae_lens_atm.compare.run.tasks import planned_jobs, steps_of
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.preflight.checks import check_devices
from sae_lens_atm.training.preflight.timing import NotTimed, Report, duration, seconds_per_step
from sae_lens_atm.training.run_file import LanguageModelRun, SyntheticRun, training_steps

_SECONDS_PER_ENTRY = 2.0  # time limit for the steps of an entry


def dry_run(
    comparison: Comparison,
    at_once: int,
    report: Report = lambda _: None,
    threads: int | None = None,
) -> dict[str, Any]:
    """Check a comparison, and return its plan with an estimate of its time on this machine.

    Args:
        comparison: the plan.
        at_once: maximum number of processes.
        report: is called before each measurement.
        threads: number of threads of each process; None divides the cores among the processes.

    Raises:
        SettingsError: the output folder is not writable, or the data do not fit.
    """
    facts = describe_plan(comparison, at_once)
    return {**facts, **estimate([comparison], at_once, report, threads)}


def describe_plan(comparison: Comparison, at_once: int) -> dict[str, Any]:
    """Check a comparison, and return its plan as names and values for a table."""
    checked = check(comparison)
    jobs = [job for job in planned_jobs(comparison) if not job.needed]
    planned = comparison.planned
    facts = {
        "runs": f"{len(planned)}, {len(_to_train(comparison))} of them to train",
        "jobs": f"{len(jobs)}, {at_once} at once",
        "SAEs in a job": ""
        if comparison.is_synthetic or cast(LanguageModelRun, planned[0].run).activations is not None
        else f"up to {max(Counter(p.group for p in planned).values())}, trained side by side",
        "entries": ", ".join(dict.fromkeys(p.entry for p in planned)),
        "L0": ", ".join(f"{l0:g}" for l0 in dict.fromkeys(p.l0 for p in planned)),
        "seeds": ", ".join(str(seed) for seed in dict.fromkeys(p.seed for p in planned)),
        "language models": ", ".join(
            str(seed) for seed in dict.fromkeys(p.model_seed for p in planned) if seed is not None
        ),
        "steps of a run": ", ".join(
            f"{n:,}" for n in sorted({training_steps(p.run) for p in planned})
        ),
        **checked,
        "output": comparison.output,
    }
    return {name: fact for name, fact in facts.items() if fact != ""}


def _to_train(comparison: Comparison) -> list[PlannedRun]:
    return [
        p for p in comparison.planned if p.settings.trained and not is_trained(p, comparison.output)
    ]


def estimate(
    comparisons: Sequence[Comparison],
    at_once: int,
    report: Report,
    threads: int | None,
    evaluates: bool = True,
) -> dict[str, str]:
    """Estimate the time of what is left to do, from a few steps of each entry.

    Args:
        comparisons: plans with the same data and output folder.
        at_once: maximum number of processes.
        report: is called before each measurement.
        threads: number of threads of each process; None divides the cores among the processes.
        evaluates: whether the SAEs are evaluated after their training.

    Returns:
        Names and values for a table.
    """
    try:
        for comparison in comparisons:
            for p in comparison.planned:
                check_devices(p.run)
    except SettingsError as error:  # a dry run may be on another machine than the comparison
        return {"estimate": f"none: {error}"}
    left = [p for comparison in comparisons for p in _to_train(comparison)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_per_job(at_once))
    steps: dict[str, float] = {}
    model, missing = ModelTime({}, 0), ""
    try:
        for name, p in {p.entry: p for p in left}.items():
            report(f"training steps of {name}")
            steps[name] = seconds_per_step(p.run, _SECONDS_PER_ENTRY)
        if not comparisons[0].is_synthetic:
            try:
                model = time_language_model(comparisons, report, evaluates)
            except NotTimed as reason:
                missing = f" without the language model ({reason})"
        data = _seconds_of_data(comparisons[0], left)
    except NotTimed as reason:
        return {"estimate": f"none: {reason}"}
    finally:
        torch.set_num_threads(before)
    total = sum(steps[p.entry] * steps_of(p) for p in left) + model.seconds + data
    return {
        "ms a step": ", ".join(f"{name} {1000 * s:.1f}" for name, s in steps.items()),
        **model.facts,
        "estimate": f"about {duration(total / at_once)}{missing}, under the present load",
    }


def _seconds_of_data(comparison: Comparison, left: Sequence[PlannedRun]) -> float:
    """Return the time to draw the synthetic batches.

    They are drawn once for each seed; if they are too large to store, once for each run.
    """
    if not comparison.is_synthetic or not left:
        return 0.0
    run = cast(SyntheticRun, left[0].run)
    # A dry run leaves no files behind: the model is made in a temporary folder.
    with tempfile.TemporaryDirectory() as temporary:
        stored = model_folder(run, comparison.output)
        exists = stored is not None and stored.exists()
        model = synthetic_model(run, comparison.output if exists else Path(temporary))
    start = time.perf_counter()
    model.sample(run.runner.batch_size)
    seconds_per_sample = (time.perf_counter() - start) / run.runner.batch_size
    pools = {pool.path: pool for pool in (pool_of(p, comparison.output) for p in left)}
    if all(pool.is_worth_keeping for pool in pools.values()):
        shapes = [pool.shape[:2] for pool in pools.values() if not pool.path.exists()]
    else:
        shapes = [(steps_of(p), cast(SyntheticRun, p.run).runner.batch_size) for p in left]
    return seconds_per_sample * sum(steps * size for steps, size in shapes)
