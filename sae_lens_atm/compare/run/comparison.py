"""Run a comparison: train, evaluate and summarise."""

import platform
import shutil
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_lens.synthetic import SyntheticModel

from sae_lens_atm.compare.plan.comparison_file import Comparison
from sae_lens_atm.compare.plan.l0_target import is_matched
from sae_lens_atm.compare.plan.planned_run import PlannedRun, settings_of
from sae_lens_atm.compare.report.results import (
    Curve,
    Entry,
    Importance,
    LetterFacts,
    Parent,
    Results,
    Run,
    Spread,
)
from sae_lens_atm.compare.report.summary import make_rows, make_tests, spread
from sae_lens_atm.compare.run.batch_pool import synthetic_model
from sae_lens_atm.compare.run.checks import check
from sae_lens_atm.compare.run.curve import still_moving
from sae_lens_atm.compare.run.processes import Job, JobEvents, cpu_name, run_jobs
from sae_lens_atm.compare.run.ray import run_jobs_on_ray
from sae_lens_atm.compare.run.stored_run import (
    FIGURES,
    TRAINING,
    has_decoder,
    is_evaluated,
    is_trained,
    load_decoder,
)
from sae_lens_atm.compare.run.tasks import make_jobs
from sae_lens_atm.data.synthetic import children_of
from sae_lens_atm.files import locked, read_json
from sae_lens_atm.metrics import Stability
from sae_lens_atm.metrics.first_letter import METRIC
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.preflight.checks import check_devices
from sae_lens_atm.training.ranks import gpu_settings
from sae_lens_atm.training.run_file import SyntheticRun

_MAX_LATENTS = 2**14  # matching the latents of two SAEs takes half a minute; with more, hours


def compare(
    comparison: Comparison,
    at_once: int,
    events: JobEvents,
    stop: StopFlag | None = None,
    cluster: str | None = None,
    threads: int | None = None,
) -> Results:
    """Train and evaluate all SAEs that are not stored yet, and return the results.

    Args:
        comparison: the plan.
        at_once: maximum number of processes.
        events: is called when jobs start, advance and end.
        stop: flag to stop between training steps.
        cluster: address of a Ray cluster. The jobs then run there, as many at once as fit. All its
            machines must have the output folder under the same path.
        threads: number of threads of each process; None divides the cores among the processes. On
            a cluster each process has one.

    Raises:
        Interrupted: a signal or `stop` stopped the jobs. The same call resumes them.
        SettingsError: a setting is wrong. Nothing has been trained.
    """
    check(comparison)
    if cluster is None:
        for planned in comparison.planned:
            check_devices(planned.run)
    stop = stop or StopFlag()
    gpus = int(bool(gpu_settings(comparison.planned[0].run)))

    def run(jobs: Sequence[Job]) -> dict[str, str]:
        if cluster is None:
            return run_jobs(jobs, at_once, events, stop, threads)
        return run_jobs_on_ray(jobs, cluster, gpus, events, stop) if jobs else {}

    with stop.on_signals(), locked(comparison.output):
        failed = run_lists(make_jobs(comparison), run)
        shutil.rmtree(comparison.output / "pools", ignore_errors=True)
        return summarise(comparison, failed)


def run_lists(
    lists: Sequence[Sequence[Job]], run: Callable[[Sequence[Job]], dict[str, str]]
) -> dict[str, str]:
    """Run lists of jobs one after the other, and return the errors of those that failed, by label.

    After a failed job that others need, the lists after its own do not run.

    Args:
        lists: the lists, as `make_jobs` returns them.
        run: runs the jobs of a list, and returns the errors of those that failed, by label.
    """
    failed: dict[str, str] = {}
    for jobs in lists:
        failed |= run(jobs)
        if any(job.needed and job.label in failed for job in jobs):
            break
    return failed


def summarise(comparison: Comparison, failed: dict[str, str]) -> Results:
    """Return the results of all runs that are stored."""
    folder = comparison.output
    done = [
        p for p in comparison.planned if is_trained(p, folder) and is_evaluated(p, folder, False)
    ]
    runs = [_run_of(planned, folder) for planned in done]
    entries = {
        p.entry: Entry(
            architecture=p.run.runner.sae.architecture(),
            role=p.settings.role,
            l0_parameter=str(p.l0_parameter),
            settings=settings_of(p),
            found_l0=p.l0 if p.is_found else None,
        )
        for p in comparison.planned
    }
    rows = make_rows(runs, _stability(done, folder))
    return Results(
        name=comparison.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        quick=comparison.quick,
        versions={name: version(name) for name in ("sae-lens-atm", "sae-lens", "torch")}
        | {"python": platform.python_version()},
        machine={
            "system": platform.system(),
            "processor": cpu_name(),
            "device": comparison.planned[0].run.runner.device,
        },
        config=comparison.content,
        absorption_metric=_metric(comparison),
        first_letters=_first_letters(done, folder),
        entries=entries,
        runs=runs,
        rows=rows,
        not_ranked=comparison.not_ranked,
        tests=make_tests(runs, rows, entries, comparison.not_ranked),
        parents=_parents(comparison, done),
        tasks=_evaluation(done[0], folder).get("tasks", []) if done else [],
        failed=failed,
        sweep=comparison.sweep,
    )


def _run_of(planned: PlannedRun, folder: Path) -> Run:
    home, runner = folder / planned.folder, planned.run.runner
    training, evaluation = read_json(home / TRAINING), read_json(home / FIGURES)
    figures: dict[str, float | None] = dict(evaluation["figures"])
    figures |= {name: training[name] for name in _COSTS if name in training}
    curve = Curve.model_validate(training["curve"]) if training.get("curve") else None
    importance = training.get("importance")
    return Run(
        entry=planned.entry,
        l0_target=planned.level,
        seed=planned.seed,
        model_seed=planned.model_seed,
        figures=figures,
        matched=is_matched(figures["l0"], planned.l0),
        moving=curve is not None and still_moving(curve, runner.sae.d_sae, runner.lr_decay_steps),
        curve=curve,
        importance=Importance.model_validate(importance) if importance else None,
        intervals=evaluation.get("intervals", {}),
        by_task=evaluation.get("by_task", {}),
        absorption_by_parent=evaluation.get("absorption_by_parent", []),
        cosine_map=evaluation.get("cosine_map", ""),
        folder=planned.folder,
    )


def _metric(comparison: Comparison) -> str:
    if comparison.is_synthetic:
        return f"{METRIC}, with the true directions of the parents"
    return METRIC if comparison.planned[0].first_letters is not None else ""


def _first_letters(done: list[PlannedRun], folder: Path) -> list[LetterFacts]:
    """Return the words and probes of each language model."""
    found: dict[int | None, Any] = {}
    for planned in done:
        if planned.first_letters is not None and planned.model_seed not in found:
            found[planned.model_seed] = _evaluation(planned, folder)["first_letters"]
    return [LetterFacts(model_seed=seed, **facts) for seed, facts in found.items()]


_COSTS = ("seconds", "group_seconds", "step_ms", "peak_memory_mib")


def _stability(done: list[PlannedRun], folder: Path) -> dict[tuple[str, float], Spread]:
    """Return the stability over seeds of each entry and L0.

    Rows with one seed and SAEs with more than `_MAX_LATENTS` latents are left out, and so are SAEs
    that were removed. Only SAEs on the same language model are compared.
    """
    stability: dict[tuple[str, float], Spread] = {}
    for key in dict.fromkeys((p.entry, p.level) for p in done):
        pairs: list[float] = []
        for model in dict.fromkeys(p.model_seed for p in done):
            seeds = [
                p
                for p in done
                if (p.entry, p.level, p.model_seed) == (*key, model) and has_decoder(p, folder)
            ]
            if len(seeds) < 2 or seeds[0].run.runner.sae.d_sae > _MAX_LATENTS:
                continue
            metric = Stability(signed=any(_evaluation(p, folder)["signed"] for p in seeds))
            for planned in seeds:
                metric.update(*load_decoder(planned, folder))
            scores = metric.compute().by_pair
            above = torch.ones_like(scores, dtype=torch.bool).triu(1)
            pairs += scores[above].tolist()
        if pairs:
            stability[key] = spread(pairs).model_copy(update={"n": len(pairs)})
    return stability


def _evaluation(planned: PlannedRun, folder: Path) -> dict[str, Any]:
    return read_json(folder / planned.folder / FIGURES)


def _parents(comparison: Comparison, done: list[PlannedRun]) -> list[Parent]:
    """Return the features with children; on a language model, the first letters."""
    run = comparison.planned[0].run
    if not done:
        return []
    probabilities = _evaluation(done[0], comparison.output).get("parent_probability", [])
    if not isinstance(run, SyntheticRun):
        return [Parent(feature=i, depth=0, probability=p) for i, p in enumerate(probabilities)]
    model = synthetic_model(run, comparison.output)
    if model.hierarchy is None:
        return []
    depth = _depths(model)
    return [
        Parent(feature=feature, depth=depth[feature], probability=p)
        for feature, p in zip(children_of(model.hierarchy), probabilities, strict=True)
    ]


def _depths(model: SyntheticModel) -> dict[int, int]:
    """Return the depth of each feature in its tree."""
    assert model.hierarchy is not None
    depths: dict[int, int] = {}
    nodes = [(root, 0) for root in model.hierarchy.roots]
    while nodes:
        node, depth = nodes.pop()
        if node.feature_index is not None:
            depths[node.feature_index] = depth
        nodes += [(child, depth + 1) for child in node.children]
    return depths
