"""Estimate the time that the language model of a comparison takes, from a few timed batches."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from sae_lens import TrainingSAE

from sae_lens_atm.compare.plan.comparison_file import Comparison
from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.compare.run.cached import contexts_to_cache
from sae_lens_atm.compare.run.letters import has_letters
from sae_lens_atm.compare.run.stored_run import is_evaluated, is_trained
from sae_lens_atm.training.phases import LOADING_MODEL
from sae_lens_atm.training.preflight.amounts import estimation_batches, llm_batches_of
from sae_lens_atm.training.preflight.timed_model import TimedModel
from sae_lens_atm.training.preflight.timing import NotTimed, Report, duration
from sae_lens_atm.training.run_file import LanguageModelRun

_SECONDS = 30.0  # time limit for the measurements


class ModelTime(NamedTuple):
    """The time of the language model of a comparison."""

    facts: dict[str, str]
    """For a table."""
    seconds: float
    """Of all jobs together."""


def time_language_model(
    comparisons: Sequence[Comparison], report: Report, evaluates: bool = True
) -> ModelTime:
    """Estimate the time of model batches, evaluations and prompts that are left to do.

    Args:
        comparisons: plans with the same language model and output folder.
        report: is called before each measurement.
        evaluates: whether the SAEs are evaluated.

    Raises:
        SettingsError: hook, width or context do not fit the model.
        NotTimed: the model or the dataset is not here.
    """
    unfinished = [_left(comparison, evaluates) for comparison in comparisons]
    left = [planned for one in unfinished for planned in one]
    if not left:
        return ModelTime({}, 0)
    output = comparisons[0].output
    run = cast(LanguageModelRun, left[0].run)
    if not evaluates and run.activations is not None and not contexts_to_cache(left):
        return ModelTime({}, 0)  # the SAEs are trained on stored activations
    if left[0].lm is not None and not Path(run.runner.model_name).is_dir():
        raise NotTimed("the comparison makes it first")
    report(LOADING_MODEL)
    model = TimedModel.load(run.runner)
    jobs = [job for one in unfinished for job in _jobs(one)]
    parts = _batches(jobs, output, model, report)
    if evaluates:
        parts += [*_evaluations(left, model, report), *_prompts(left, output, model, report)]
    # Without an evaluation, SAEs on cached activations need no model.
    loads = (len(jobs) if evaluates or run.activations is None else 1) * model.loading
    facts = {name: f"{what}, {duration(seconds)}" for name, what, seconds in parts}
    return ModelTime(facts, loads + sum(seconds for *_, seconds in parts))


_Part = tuple[str, str, float]
"""The name of a row, what it counts, and the seconds."""


def _left(comparison: Comparison, evaluates: bool) -> list[PlannedRun]:
    def is_done(planned: PlannedRun) -> bool:
        if evaluates:
            return is_evaluated(planned, comparison.output, with_map=False)
        return is_trained(planned, comparison.output)

    return [planned for planned in comparison.planned if not is_done(planned)]


def _jobs(left: Iterable[PlannedRun]) -> list[list[PlannedRun]]:
    """Return the runs that are evaluated by one process each, with one load of the model."""
    jobs: dict[tuple[str, float], list[PlannedRun]] = {}
    for planned in left:
        is_cached = cast(LanguageModelRun, planned.run).activations is not None
        key = (planned.seeds, planned.l0) if is_cached else (planned.group, 0.0)
        jobs.setdefault(key, []).append(planned)
    return list(jobs.values())


def _batches(
    jobs: Sequence[Sequence[PlannedRun]], output: Path, model: TimedModel, report: Report
) -> list[_Part]:
    cfg = model.cfg
    report("batches of the language model")
    timed = model.time_batch(0.3 * _SECONDS)
    shape = f"{cfg.store_batch_size_prompts:,} x {cfg.context_size:,} tokens{timed.note}"
    if cast(LanguageModelRun, jobs[0][0].run).activations is not None:
        planned = [p for job in jobs for p in job]
        batches = -(-contexts_to_cache(planned) // cfg.store_batch_size_prompts)
        name, what = "cache", f"{batches:,} model batches of {shape}"
        return [(name, what, batches * timed.seconds)] if batches else []
    number = for_scale = 0
    for job in jobs:
        to_train = [p for p in job if p.settings.trained and not is_trained(p, output)]
        if to_train:
            served = max(estimation_batches(p.run) for p in to_train) * cfg.train_batch_size_tokens
            before = llm_batches_of(cfg, served + 1, model.share_kept)
            for_scale += before if served else 0
            tokens = cast(LanguageModelRun, to_train[0].run).runner.training_tokens
            number += llm_batches_of(cfg, served + tokens, model.share_kept)
    what = f"{number:,} model batches of {shape}"
    if for_scale:
        what += f", at most {for_scale:,} of them before step 1 for the scale"
    return [("language model", what, number * timed.seconds)] if number else []


def _evaluations(left: Sequence[PlannedRun], model: TimedModel, report: Report) -> list[_Part]:
    if model.cfg.n_eval_batches <= 0:
        return []
    report("evaluation with the language model")
    config = left[0].run.runner.sae.to_dict()
    sae = TrainingSAE[Any].from_dict(config).to(model.cfg.device).eval()
    first, further = model.time_evaluation(sae, 0.4 * _SECONDS)
    seconds = sum(first.seconds + (len(job) - 1) * further for job in _jobs(left))
    tokens = model.evaluated.numel() * model.cfg.n_eval_batches
    return [("evaluation", f"{len(left):,} SAEs on {tokens:,} tokens{first.note}", seconds)]


def _prompts(
    left: Sequence[PlannedRun], output: Path, model: TimedModel, report: Report
) -> list[_Part]:
    firsts = {p.model_seed: p for p in reversed(left) if not has_letters(p, output)}
    cfg = next((p.first_letters for p in firsts.values()), None)
    if cfg is None:
        return []
    report("prompts for first letters")
    number, seconds = model.time_prompts(cfg, 0.3 * _SECONDS)
    what = f"{len(firsts) * number:,} prompts, without the probes"
    return [("first letters", what, len(firsts) * seconds)]
