"""Training a run file: train, save the SAE, evaluate it."""

import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens import TrainingSAE
from torch.random import fork_rng

from sae_lens_atm.files import locked
from sae_lens_atm.torchrun import rank
from sae_lens_atm.training.cached_run import prepare_cached
from sae_lens_atm.training.checkpoints import extended, newest_checkpoint
from sae_lens_atm.training.curves_page import write_curves
from sae_lens_atm.training.fit import RunContext
from sae_lens_atm.training.history import LastBatch
from sae_lens_atm.training.hooks import OnStep, StopFlag
from sae_lens_atm.training.language_model_run import prepare_language_model
from sae_lens_atm.training.phases import OnPhase, ignore_phase
from sae_lens_atm.training.preflight.checks import check_devices, check_output, check_run
from sae_lens_atm.training.ranks import gpu_settings, joined
from sae_lens_atm.training.run_file import Run, SyntheticRun
from sae_lens_atm.training.synthetic_run import prepare_synthetic


@dataclass
class Result:
    """A finished run."""

    sae: TrainingSAE[Any]
    output_path: Path
    seconds: float
    figures: dict[str, float] = field(default_factory=dict[str, float])
    """Figures of the final evaluation."""
    skipped_batches: int = 0
    """Number of bad batches (NaN, Inf, overflow) that were skipped."""
    training_l0: float = float("nan")
    """Mean L0 of the last training step; NaN if none was taken."""
    saved_l0: float = float("nan")
    """Mean L0 of the SAE that is saved, on the batch of that step."""


def train(
    run: Run,
    resume: str | Path | None = None,
    on_step: OnStep | None = None,
    stop: StopFlag | None = None,
    keep: int | None = None,
    extend: int = 0,
    on_phase: OnPhase = ignore_phase,
) -> Result:
    """Train a run to its end and save the SAE in its `output_path`.

    Under torchrun, each process trains on its share of the batches. Rank 0 saves and evaluates.

    Args:
        run: the run to train.
        resume: a checkpoint to resume from, or the folder of a run (its newest checkpoint).
        on_step: called after each training step, with the trainer and the step's output.
        stop: requests a stop from outside. Signals do, too.
        keep: number of checkpoints to keep, the newest; None keeps all.
        extend: number of samples (tokens) to train beyond the length in the run's settings. Needs
            `resume`. The SAE of the shorter run is replaced when the longer one is complete.
        on_phase: is called with the progress of the work before and after training.

    Raises:
        Interrupted: a signal or `stop` requested it. A checkpoint is saved, unless there is no step
            yet.
        SettingsError, CheckpointError: run, data or checkpoint do not fit, or another process
            writes to `output_path`. Nothing was trained.
        SaveError: the disk is full, for example. The newest complete checkpoint is intact.
        NonFiniteBatchError: too many bad batches in a row. The last good step is saved.
        RankLostError: another process has ended. Rank 0 has saved the last complete step.
    """
    run = extended(run, extend)
    checkpoint = None if resume is None else newest_checkpoint(resume, run if extend else None)
    check_run(run, checkpoint, extend=extend)
    return train_checked(run, checkpoint, on_step, stop, keep, extend, on_phase)


def train_checked(
    run: Run,
    checkpoint: Path | None = None,
    on_step: OnStep | None = None,
    stop: StopFlag | None = None,
    keep: int | None = None,
    extend: int = 0,
    on_phase: OnPhase = ignore_phase,
) -> Result:
    """Train as `train`, after `newest_checkpoint` and `check_run` were called."""
    check_devices(run)
    stop = stop or StopFlag()
    output = Path(run.runner.output_path or "")
    lock = _locked_folders(run) if rank() == 0 else nullcontext()
    with lock, joined(run) as ranks, fork_rng({*gpu_settings(run).values()}):
        if rank() == 0:  # another run may have ended since the check
            check_output(run, checkpoint, extend > 0)
        torch.manual_seed(run.seed)
        start = time.perf_counter()
        last = LastBatch()
        context = RunContext(checkpoint, on_step, stop, keep, ranks, last, on_phase)
        if isinstance(run, SyntheticRun):
            prepared = prepare_synthetic(run, context)
        elif run.activations is not None:
            prepared = prepare_cached(run, context)
        else:
            prepared = prepare_language_model(run, context)
        try:
            with stop.on_signals():  # also while the result is saved
                sae, skipped = prepared.fit()
        finally:  # a run that was stopped has curves, too
            if context.writes:
                write_curves(output, {"architecture": run.runner.sae.architecture()})
        sae.eval()
        figures, saved_l0 = dict[str, float](), float("nan")
        if context.writes:
            figures, saved_l0 = prepared.evaluate_safely(sae, output, last)
        seconds = time.perf_counter() - start
        return Result(sae, output, seconds, figures, skipped, last.training_l0, saved_l0)


@contextmanager
def _locked_folders(run: Run) -> Generator[None]:
    """Lock the folders of the SAE and of the checkpoints against other runs."""
    output, checkpoints = Path(run.runner.output_path or ""), Path(run.runner.checkpoint_path or "")
    real = checkpoints.resolve()
    is_inside = output.resolve() in (real, *real.parents)
    with locked(output), nullcontext() if is_inside else locked(checkpoints, "checkpoint_path"):
        yield
