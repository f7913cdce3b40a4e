"""The jobs of a comparison that are left to do."""

from functools import partial
from itertools import groupby
from pathlib import Path
from typing import cast

from sae_lens_atm.compare.plan.comparison_file import Comparison
from sae_lens_atm.compare.plan.planned_run import PlannedRun, spelling_lm_folder
from sae_lens_atm.compare.report.wording import show_l0
from sae_lens_atm.compare.run.batch_pool import model_folder, synthetic_model
from sae_lens_atm.compare.run.cached import (
    CachedData,
    contexts_to_cache,
    evaluate_cached,
    make_cache,
)
from sae_lens_atm.compare.run.language_model import train_group
from sae_lens_atm.compare.run.letters import letter_jobs
from sae_lens_atm.compare.run.probing import probing_jobs
from sae_lens_atm.compare.run.processes import Job, OnProgress, StepCounter
from sae_lens_atm.compare.run.stored_run import (
    has_sae,
    has_training,
    is_evaluated,
    is_trained,
)
from sae_lens_atm.compare.run.synthetic import SyntheticData, evaluate_one, pool_of
from sae_lens_atm.compare.run.training import train_one
from sae_lens_atm.data.spelling.model import (
    SpellingLMConfig,
    is_spelling_lm,
    make_spelling_lm,
)
from sae_lens_atm.training.cached_run import open_cache
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.phases import LOADING_MODEL, Phase
from sae_lens_atm.training.run_file import LanguageModelRun, SyntheticRun, training_steps


def _make_synthetic_model(
    run: SyntheticRun, folder: Path, _on_progress: OnProgress, _stop: StopFlag
) -> None:
    synthetic_model(run, folder)


def _make_language_model(
    lm: SpellingLMConfig, folder: Path, on_progress: OnProgress, stop: StopFlag
) -> None:
    counter = StepCounter(on_progress)

    def on_step(_loss: float) -> None:
        counter.count()
        stop.check()

    make_spelling_lm(lm, folder, on_step)


def _draw_pool(planned: PlannedRun, folder: Path, on_progress: OnProgress, stop: StopFlag) -> None:
    run = cast(SyntheticRun, planned.run)
    model = synthetic_model(run, folder)
    counter = StepCounter(on_progress)
    for _ in pool_of(planned, folder).draw(model, planned.seed):
        counter.count()
        stop.check()


def _run_one(
    planned: PlannedRun,
    folder: Path,
    points: int,
    with_map: bool,
    on_progress: OnProgress,
    stop: StopFlag,
) -> None:
    model = synthetic_model(cast(SyntheticRun, planned.run), folder)
    data = SyntheticData(planned, model, folder)
    on_step = StepCounter(on_progress).on_step
    train_one(planned, data, folder, points, on_step, stop)
    evaluate_one(planned, model, folder, with_map)


def _make_cache(planned: tuple[PlannedRun, ...], on_progress: OnProgress, stop: StopFlag) -> None:
    before = 0
    on_progress(Phase(LOADING_MODEL))

    def count(done: int, contexts: int) -> None:
        nonlocal before
        on_progress(done - before)
        before = done
        on_progress(Phase("caching", done, contexts, "contexts"))
        stop.check()

    make_cache(planned, count)


def _train_cached(
    planned: PlannedRun, folder: Path, points: int, on_progress: OnProgress, stop: StopFlag
) -> None:
    data = CachedData(planned, open_cache(cast(LanguageModelRun, planned.run)))
    on_step = StepCounter(on_progress).on_step
    train_one(planned, data, folder, points, on_step, stop)


def _evaluate_cached(
    group: tuple[PlannedRun, ...], folder: Path, on_progress: OnProgress, stop: StopFlag
) -> None:
    evaluate_cached(group, folder, stop, on_progress, on_progress)


def _run_group(
    group: tuple[PlannedRun, ...],
    folder: Path,
    points: int,
    evaluate: bool,
    on_progress: OnProgress,
    stop: StopFlag,
) -> None:
    on_step = StepCounter(on_progress).on_step
    train_group(group, folder, points, on_step, stop, on_progress, evaluate)


def make_jobs(comparison: Comparison, evaluate: bool = True) -> list[list[Job]]:
    """Return the jobs that are left to do, in lists that run one after the other.

    On synthetic data: making the model, drawing batches, then one job for each run. On a language
    model: making the models, reading their first letters and probing tasks, then one job for each
    group of runs that share activations. On cached activations: the cache, the first letters and
    probing tasks, then for each seed one job for each run, and their evaluation.

    Args:
        comparison: the plan.
        evaluate: whether SAEs on a language model are evaluated, too. On synthetic data all are.
    """
    if comparison.is_synthetic:
        return _synthetic_jobs(comparison)
    if cast(LanguageModelRun, comparison.planned[0].run).activations is not None:
        return _cached_jobs(comparison, evaluate)
    return _language_model_jobs(comparison, evaluate)


def _is_done(planned: PlannedRun, folder: Path, evaluate: bool) -> bool:
    return is_evaluated(planned, folder, False) if evaluate else has_training(planned, folder)


def _reading_jobs(left: list[PlannedRun], folder: Path, evaluate: bool) -> list[Job]:
    return letter_jobs(left, folder) + probing_jobs(left, folder) if evaluate else []


def _cached_jobs(comparison: Comparison, evaluate: bool) -> list[list[Job]]:
    folder = comparison.output
    left = [p for p in comparison.planned if not _is_done(p, folder, evaluate)]
    contexts = contexts_to_cache(comparison.planned) if left else 0
    cache = Job(
        "cache", contexts, partial(_make_cache, tuple(comparison.planned)), True, alone=True
    )
    jobs = [[cache] if contexts else [], _reading_jobs(left, folder, evaluate)]
    for _, runs in groupby(left, key=lambda p: p.seed):  # complete results seed by seed
        group = list(runs)
        to_train = (p for p in group if not is_trained(p, folder))
        jobs.append(
            [
                Job(
                    p.label, steps_of(p), partial(_train_cached, p, folder, comparison.curve_points)
                )
                for p in to_train
            ]
        )
        if not evaluate:
            continue
        levels = dict.fromkeys(p.level for p in group)
        jobs.append(
            [
                Job(
                    f"evaluate L0 {show_l0(l0)}, {group[0].seeds}",
                    sum(p.level == l0 for p in group),
                    partial(_evaluate_cached, tuple(p for p in group if p.level == l0), folder),
                )
                for l0 in levels
            ]
        )
    return jobs


def _language_model_jobs(comparison: Comparison, evaluate: bool) -> list[list[Job]]:
    folder, points = comparison.output, comparison.curve_points
    groups = [list(g) for _, g in groupby(comparison.planned, key=lambda p: p.group)]
    runs = [
        Job(
            group[0].group,
            sum(steps_of(p) for p in group if not is_trained(p, folder)),
            partial(_run_group, tuple(group), folder, points, evaluate),
        )
        for group in groups
        if not all(_is_done(p, folder, evaluate) for p in group)
    ]
    lms = {p.lm.seed: p.lm for p in comparison.planned if p.lm is not None} if runs else {}
    homes = {seed: spelling_lm_folder(folder, lm) for seed, lm in lms.items()}
    models = [
        Job(f"model {seed}", lm.steps, partial(_make_language_model, lm, homes[seed]), needed=True)
        for seed, lm in lms.items()
        if not is_spelling_lm(lm, homes[seed])
    ]
    left = [p for group in groups for p in group if not _is_done(p, folder, evaluate)]
    return [models, _reading_jobs(left, folder, evaluate), runs]


def _synthetic_jobs(comparison: Comparison) -> list[list[Job]]:
    folder, points = comparison.output, comparison.curve_points
    models: list[Job] = []
    pools: dict[Path, Job] = {}
    runs: list[Job] = []
    for planned in comparison.planned:
        to_train = not is_trained(planned, folder)
        has_weights = to_train or has_sae(planned, folder)
        with_map = needs_cosine_map(comparison, planned) and has_weights
        if not to_train and is_evaluated(planned, folder, with_map):
            continue
        if to_train and planned.settings.trained:
            pool = pool_of(planned, folder)
            if pool.is_worth_keeping and not pool.path.exists():
                label = f"{pool.shape[0]} batches of {pool.shape[1]}, seed {planned.seed}"
                draw = partial(_draw_pool, planned, folder)
                pools.setdefault(pool.path, Job(label, pool.shape[0], draw))
        work = partial(_run_one, planned, folder, points, with_map)
        runs.append(Job(planned.label, steps_of(planned) if to_train else 0, work))
    run = cast(SyntheticRun, comparison.planned[0].run)
    stored = model_folder(run, folder)
    if runs and stored is not None and not stored.exists():
        models.append(Job("synthetic model", 0, partial(_make_synthetic_model, run, folder)))
    return [models, list(pools.values()), runs]


def planned_jobs(comparison: Comparison) -> list[Job]:
    """Return the jobs that are left to do, in order."""
    return [job for jobs in make_jobs(comparison) for job in jobs]


def steps_of(planned: PlannedRun) -> int:
    """Return the number of training steps of a run; 0 for an untrained control."""
    return training_steps(planned.run) if planned.settings.trained else 0


def needs_cosine_map(comparison: Comparison, planned: PlannedRun) -> bool:
    """Return whether a run stores its picture of cosines.

    One run of each entry does: at the middle L0, with the first seed.
    """
    levels = sorted({p.level for p in comparison.planned})
    middle = levels[(len(levels) - 1) // 2]
    return planned.level == middle and planned.seed == comparison.planned[0].seed
