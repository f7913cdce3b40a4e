"""A comparison from its plan to its results."""

import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.synthetic import SyntheticModel
from sae_lens.util import temporary_seed

from sae_lens_atm.compare.config import Comparison, Planned, settings_of
from sae_lens_atm.compare.data import Pool, kept_model, synthetic_model
from sae_lens_atm.compare.history import still_moving
from sae_lens_atm.compare.jobs import Job, Listener, StepCounter, cpu_name, run_jobs, threads_each
from sae_lens_atm.compare.kept import (
    FIGURES,
    TRAINING,
    is_evaluated,
    is_trained,
    kept_decoder,
    read_json,
)
from sae_lens_atm.compare.language_model_runs import train_group
from sae_lens_atm.compare.matching import is_matched
from sae_lens_atm.compare.results import Curve, Entry, Importance, Parent, Results, Run, Spread
from sae_lens_atm.compare.summary import make_rows, make_tests
from sae_lens_atm.compare.synthetic_runs import evaluate_one, pool_of, train_one
from sae_lens_atm.metrics import Stability
from sae_lens_atm.settings import LanguageModelRun, SettingsError, SyntheticRun
from sae_lens_atm.synthetic import children_of
from sae_lens_atm.train import check_data, check_devices
from sae_lens_atm.watch import Interrupted, StopFlag

_TIMED_STEPS = 5  # of each entry, for the estimate of a dry run


@dataclass(frozen=True)
class _MakeModel:
    run: SyntheticRun
    folder: Path

    def __call__(self, _on_progress: Callable[[int], None], _stop: StopFlag) -> None:
        synthetic_model(self.run, self.folder)


@dataclass(frozen=True)
class _DrawPool:
    planned: Planned
    folder: Path

    def __call__(self, on_progress: Callable[[int], None], stop: StopFlag) -> None:
        run = cast(SyntheticRun, self.planned.run)
        model = synthetic_model(run, self.folder)
        counter = StepCounter(on_progress)
        for _ in pool_of(self.planned, self.folder).draw(model, self.planned.seed):
            counter.count()
            if stop.signal_number is not None:
                raise Interrupted(None, stop.signal_number)


@dataclass(frozen=True)
class _RunOne:
    planned: Planned
    folder: Path
    points: int
    with_map: bool

    def __call__(self, on_progress: Callable[[int], None], stop: StopFlag) -> None:
        model = synthetic_model(cast(SyntheticRun, self.planned.run), self.folder)
        on_step = StepCounter(on_progress).on_step
        train_one(self.planned, model, self.folder, self.points, on_step, stop)
        evaluate_one(self.planned, model, self.folder, self.with_map)


@dataclass(frozen=True)
class _RunGroup:
    group: tuple[Planned, ...]
    folder: Path
    points: int

    def __call__(self, on_progress: Callable[[int], None], stop: StopFlag) -> None:
        on_step = StepCounter(on_progress).on_step
        train_group(self.group, self.folder, self.points, on_step, stop)


def compare(
    comparison: Comparison, at_once: int, listener: Listener, stop: StopFlag | None = None
) -> Results:
    """Train and evaluate whatever is not kept yet, and sum up.

    Raises:
        Interrupted: by a signal or `stop`; the same call goes on from there.
        SettingsError: something does not fit, before any training.
    """
    folder = comparison.output
    check(comparison)
    folder.mkdir(parents=True, exist_ok=True)
    for planned in comparison.planned:
        check_devices(planned.run)
    stop = stop or StopFlag()
    failed: dict[str, str] = {}
    with stop.on_signals():
        for jobs in make_jobs(comparison):
            failed |= run_jobs(jobs, at_once, listener, stop)
        shutil.rmtree(folder / "pools", ignore_errors=True)
        return summarise(comparison, failed)


def check(comparison: Comparison) -> None:
    """Check what can be checked without loading data or models.

    Raises:
        SettingsError: the folder cannot be written, or a language model's data do not fit.
    """
    folder = comparison.output
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise SettingsError(f"output_path {folder} is not writable: see {existing}")
    run = comparison.planned[0].run
    if isinstance(run, LanguageModelRun):
        check_data(run)


def make_jobs(comparison: Comparison) -> list[list[Job]]:
    """What is left to do: a synthetic model to make, then batches to draw, then runs."""
    folder, points = comparison.output, comparison.curve_points
    if not comparison.is_synthetic:
        groups = [list(g) for _, g in groupby(comparison.planned, key=lambda p: p.seed)]
        runs: list[Job] = [
            Job(
                f"seed {group[0].seed}",
                sum(_steps(p) for p in group if not is_trained(p, folder)),
                _RunGroup(tuple(group), folder, points),
            )
            for group in groups
            if not all(is_evaluated(p, folder, with_map=False) for p in group)
        ]
        return [runs]
    models: list[Job] = []
    pools: dict[Path, Job] = {}
    runs: list[Job] = []
    for planned in comparison.planned:
        with_map = has_map(comparison, planned)
        to_train = not is_trained(planned, folder)
        if not to_train and is_evaluated(planned, folder, with_map):
            continue
        if to_train and planned.settings.trained:
            pool: Pool = pool_of(planned, folder)
            if pool.is_worth_keeping and not pool.path.exists():
                label = f"batches of seed {planned.seed}"
                draw = _DrawPool(planned, folder)
                pools.setdefault(pool.path, Job(label, pool.shape[0], draw))
        work = _RunOne(planned, folder, points, with_map)
        runs.append(Job(planned.label, _steps(planned) if to_train else 0, work))
    run = cast(SyntheticRun, comparison.planned[0].run)
    kept = kept_model(run, folder)
    if runs and kept is not None and not kept.exists():
        models.append(Job("synthetic model", 0, _MakeModel(run, folder)))
    return [models, list(pools.values()), runs]


def planned_jobs(comparison: Comparison) -> list[Job]:
    """All that is left to do, in order."""
    return [job for jobs in make_jobs(comparison) for job in jobs]


def _steps(planned: Planned) -> int:
    return planned.run.runner.total_training_steps if planned.settings.trained else 0


def has_map(comparison: Comparison, planned: Planned) -> bool:
    """Of each entry, one run shows its cosine map: the first seed's, at the middle L0."""
    levels = sorted({p.l0 for p in comparison.planned})
    middle = levels[(len(levels) - 1) // 2]
    return planned.l0 == middle and planned.seed == comparison.planned[0].seed


def summarise(comparison: Comparison, failed: dict[str, str]) -> Results:
    """The results of all runs that are kept."""
    folder = comparison.output
    done = [
        p for p in comparison.planned if is_trained(p, folder) and is_evaluated(p, folder, False)
    ]
    runs = [_run_of(planned, folder) for planned in done]
    entries = {
        p.entry: Entry(
            architecture=p.run.runner.sae.architecture(),
            role=p.settings.role,
            l0_knob=str(p.knob),
            settings=settings_of(p),
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
        entries=entries,
        runs=runs,
        rows=rows,
        not_ranked=comparison.not_ranked,
        tests=make_tests(runs, rows, entries, comparison.not_ranked),
        parents=_parents(comparison, done),
        failed=failed,
    )


def _run_of(planned: Planned, folder: Path) -> Run:
    home = folder / planned.folder
    trained, found = read_json(home / TRAINING), read_json(home / FIGURES)
    figures: dict[str, float | None] = dict(found["figures"])
    figures |= {name: trained[name] for name in _COSTS if name in trained}
    curve = Curve.model_validate(trained["curve"]) if trained.get("curve") else None
    importance = trained.get("importance")
    return Run(
        entry=planned.entry,
        l0_target=planned.l0,
        seed=planned.seed,
        figures=figures,
        matched=is_matched(figures["l0"], planned.l0),
        moving=curve is not None and still_moving(curve, planned.run.runner.sae.d_sae),
        curve=curve,
        importance=Importance.model_validate(importance) if importance else None,
        absorption_by_parent=found.get("absorption_by_parent", []),
        cosine_map=found.get("cosine_map", ""),
        folder=planned.folder,
    )


_COSTS = ("seconds", "group_seconds", "step_ms", "peak_memory_mib")


def _stability(done: list[Planned], folder: Path) -> dict[tuple[str, float], Spread]:
    """Of each entry and L0 that has two seeds or more."""
    found: dict[tuple[str, float], Spread] = {}
    for key in dict.fromkeys((p.entry, p.l0) for p in done):
        seeds = [p for p in done if (p.entry, p.l0) == key]
        if len(seeds) < 2:
            continue
        metric = Stability(signed=any(_found(p, folder)["signed"] for p in seeds))
        for planned in seeds:
            metric.update(*kept_decoder(planned, folder))
        scores = metric.compute()
        pairs = len(seeds) * (len(seeds) - 1) // 2
        found[key] = Spread(mean=_finite(scores.mean), sd=_finite(scores.sd), n=pairs)
    return found


def _found(planned: Planned, folder: Path) -> dict[str, Any]:
    return read_json(folder / planned.folder / FIGURES)


def _finite(value: float) -> float | None:
    return value if value == value else None


def _parents(comparison: Comparison, done: list[Planned]) -> list[Parent]:
    run = comparison.planned[0].run
    if not isinstance(run, SyntheticRun) or not done:
        return []
    model = synthetic_model(run, comparison.output)
    if model.hierarchy is None:
        return []
    depth = _depths(model)
    probability = _found(done[0], comparison.output)["parent_probability"]
    return [
        Parent(feature=feature, depth=depth[feature], probability=p)
        for feature, p in zip(children_of(model.hierarchy), probability, strict=True)
    ]


def _depths(model: SyntheticModel) -> dict[int, int]:
    assert model.hierarchy is not None
    found: dict[int, int] = {}
    level = [(root, 0) for root in model.hierarchy.roots]
    while level:
        node, depth = level.pop()
        if node.feature_index is not None:
            found[node.feature_index] = depth
        level += [(child, depth + 1) for child in node.children]
    return found


# --- dry run -------------------------------------------------------------------------------------


def dry_run(comparison: Comparison, at_once: int) -> dict[str, Any]:
    """What a comparison would do, and about how long it would take here."""
    check(comparison)
    *_, jobs = make_jobs(comparison)
    folder = comparison.output
    left = [p for p in comparison.planned if p.settings.trained and not is_trained(p, folder)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads_each(at_once))
    seconds = {name: _seconds_a_step(p) for name, p in {p.entry: p for p in left}.items()}
    torch.set_num_threads(before)
    total = sum(seconds[p.entry] * _steps(p) for p in left)
    data = 0.0
    if comparison.is_synthetic and left:
        model = synthetic_model(cast(SyntheticRun, left[0].run), folder)
        start = time.perf_counter()
        batches = {pool_of(p, folder).path: p for p in left}
        model.sample(cast(SyntheticRun, left[0].run).runner.batch_size)
        data = (time.perf_counter() - start) * sum(_steps(p) for p in batches.values())
    estimate = (total + data) / at_once
    planned = comparison.planned
    return {
        "runs": f"{len(planned)}, of which {len(planned) - len(left)} need no training (any more)",
        "jobs": f"{len(jobs)}, {at_once} at once",
        "entries": ", ".join(dict.fromkeys(p.entry for p in planned)),
        "L0": ", ".join(f"{l0:g}" for l0 in dict.fromkeys(p.l0 for p in planned)),
        "seeds": ", ".join(str(seed) for seed in dict.fromkeys(p.seed for p in planned)),
        "steps of a run": f"{planned[0].run.runner.total_training_steps:,}",
        "ms a step": ", ".join(f"{name} {1000 * s:.1f}" for name, s in seconds.items()),
        "estimate": f"about {_duration(estimate)}"
        + ("" if comparison.is_synthetic else ", and the language model's forward passes"),
        "output": folder,
    }


def _seconds_a_step(planned: Planned) -> float:
    runner = planned.run.runner
    batch = getattr(runner, "batch_size", None) or getattr(runner, "train_batch_size_tokens", 1)
    with temporary_seed(0):
        x = torch.randn(batch, runner.sae.d_in, device=runner.device)
        sae = TrainingSAE[Any].from_dict(runner.sae.to_dict()).to(runner.device)
        trainer: SAETrainer[Any, Any] = SAETrainer(runner.to_sae_trainer_config(), sae, iter(()))
        trainer.step(x)
        start = time.perf_counter()
        for _ in range(_TIMED_STEPS):
            trainer.step(x)
        if x.is_cuda:
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / _TIMED_STEPS


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
