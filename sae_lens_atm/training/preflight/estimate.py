"""Estimate the time of each phase of a run: the table of `train --dry-run`."""

import time
from pathlib import Path
from typing import Any

from sae_lens import SAETrainer

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.synthetic import evaluate
from sae_lens_atm.torchrun import size as number_of_processes
from sae_lens_atm.training.checkpoints import samples_of
from sae_lens_atm.training.hooks import synchronize
from sae_lens_atm.training.preflight.amounts import (
    checkpoints_left,
    estimation_batches,
    evaluations_in_training,
)
from sae_lens_atm.training.preflight.checks import check_devices, unit_of
from sae_lens_atm.training.preflight.language_model_time import language_model_entries
from sae_lens_atm.training.preflight.memory import stream_bytes
from sae_lens_atm.training.preflight.model_facts import short
from sae_lens_atm.training.preflight.timing import (
    AFTER,
    BEFORE,
    TRAINING,
    Entry,
    NotTimed,
    Report,
    Timed,
    sizes_up_to,
    time_checkpoint,
    time_steps,
    time_work,
    timed_trainer,
)
from sae_lens_atm.training.run_file import LanguageModelRun, Run, SyntheticRun, batch_size_of
from sae_lens_atm.training.synthetic_run import build_synthetic_model

SECONDS = 20.0
"""Time limit for the measurements. Loading the model and the data comes on top."""


def estimate_time(
    run: Run,
    checkpoint: Path | None = None,
    limit: float = SECONDS,
    report: Report = lambda _: None,
) -> list[Entry]:
    """Estimate the time of each phase of a run, from a few steps on its device.

    Args:
        run: the run, checked.
        checkpoint: the checkpoint that it resumes from.
        limit: seconds for the measurements.
        report: is called before each measurement.
    """
    try:
        check_devices(run)
    except SettingsError as error:
        return [Entry(TRAINING, "everything", None, str(error))]
    done = 0 if checkpoint is None else max(samples_of(checkpoint), 0)
    first = done // batch_size_of(run)
    share = batch_size_of(run) // number_of_processes()
    report("training steps of the SAE")
    try:
        with timed_trainer(run, share) as trainer:
            parts = time_steps(run, trainer, 0.4 * limit, first, share)
            entries = [_steps_entry(parts, share, unit_of(run))]
            estimate = (
                _synthetic_entries if isinstance(run, SyntheticRun) else language_model_entries
            )
            entries += estimate(run, trainer, first, checkpoint is None, limit, report)  # pyright: ignore[reportArgumentType]
            entries += _checkpoints(run, trainer, first, report)
            entries += _not_timed(run)
    except NotTimed as reason:
        return [Entry(TRAINING, "everything", None, str(reason))]
    order = (BEFORE, TRAINING, AFTER)
    return sorted(entries, key=lambda entry: order.index(entry.phase))


def _steps_entry(parts: list[tuple[Timed, int]], batch: int, what: str) -> Entry:
    steps = sum(number for _, number in parts)
    total = sum(timed.seconds * number for timed, number in parts)
    note = max((timed.note for timed, _ in parts), default="")
    return Entry(TRAINING, f"SAE: {steps:,} steps, each with {batch:,} {what}{note}", total)


def _checkpoints(
    run: Run, trainer: SAETrainer[Any, Any], first: int, report: Report
) -> list[Entry]:
    number = checkpoints_left(run, first)
    if not number:
        return []
    report("a checkpoint")
    more = stream_bytes(run.runner) if isinstance(run, LanguageModelRun) else 0
    what = f"{number:,} checkpoints"
    try:
        return [Entry(TRAINING, what, number * time_checkpoint(trainer, more))]
    except NotTimed as reason:
        return [Entry(TRAINING, what, None, str(reason))]


def _not_timed(run: Run) -> list[Entry]:
    """Return what a run does and the measurements leave out."""
    entries: list[Entry] = []
    if number_of_processes() > 1:
        reason = "steps are timed in one process"
        entries.append(Entry(TRAINING, "exchange between processes", None, reason))
    if isinstance(run, LanguageModelRun) and (run.runner.compile_llm or run.runner.compile_sae):
        reason = "steps are timed without torch.compile"
        entries.append(Entry(BEFORE, "compilation", None, reason))
    return entries


# --- synthetic data ------------------------------------------------------------------------------


def _synthetic_entries(
    run: SyntheticRun,
    trainer: SAETrainer[Any, Any],
    first: int,
    estimates: bool,
    limit: float,
    report: Report,
) -> list[Entry]:
    cfg = run.runner
    report("building the synthetic model")
    start = time.perf_counter()
    try:
        model = build_synthetic_model(run)
    except Exception as error:
        if not isinstance(cfg.synthetic_model, str):  # else it may be on the Hub
            key = "synthetic_model" if run.hierarchy is None else "hierarchy_model"
            raise SettingsError(f"{key} cannot be built: {short(error)}") from error
        return [Entry(BEFORE, "synthetic data and evaluation", None, short(error))]
    entries = [Entry(BEFORE, "build the synthetic model", time.perf_counter() - start)]

    def draw(samples: int) -> None:
        model.sample(samples)
        synchronize(cfg.device)

    report("drawing batches")
    drawn = time_work(draw, sizes_up_to(cfg.batch_size), 0.2 * limit)
    before = estimation_batches(run) if estimates else 0
    if before:
        what = f"estimate the activation scale: {before:,} batches of {cfg.batch_size:,}"
        entries.append(Entry(BEFORE, what, before * drawn.seconds))
    steps = cfg.total_training_steps - first
    entries.append(Entry(TRAINING, f"draw {steps:,} batches", steps * drawn.seconds))
    in_training, final = evaluations_in_training(run, first), int(cfg.run_final_eval)
    if cfg.eval_samples > 0 and in_training + final:
        report("evaluation")
        timed = time_work(
            lambda samples: evaluate(trainer.sae, model, samples, 0, cfg.batch_size),
            sizes_up_to(cfg.eval_samples, 256),
            0.3 * limit,
        )
        what = f"of {cfg.eval_samples:,} samples{timed.note}"
        if in_training:
            seconds = in_training * timed.seconds
            entries.append(Entry(TRAINING, f"{in_training:,} evaluations {what}", seconds))
        if final:
            entries.append(Entry(AFTER, f"evaluation {what}", timed.seconds))
    return entries
