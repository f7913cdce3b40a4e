"""The work of the command that trains one SAE."""

import os
import shlex
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.table import Table

from sae_lens_atm.cli.progress import TrainingProgress, figures_table
from sae_lens_atm.cli.terminal import (
    config_path,
    console,
    exit_with,
    facts_table,
    timing_status,
)
from sae_lens_atm.cli.threads import use_threads, warn_if_busy
from sae_lens_atm.errors import Interrupted, SaveError, SettingsError
from sae_lens_atm.torchrun import rank, size
from sae_lens_atm.training.checkpoints import any_checkpoint, extended, newest_checkpoint
from sae_lens_atm.training.preflight.checks import check_run
from sae_lens_atm.training.preflight.estimate import estimate_time
from sae_lens_atm.training.preflight.timing import Entry, duration
from sae_lens_atm.training.quiet import silence_saelens
from sae_lens_atm.training.resume import is_already_trained, resume_in_place
from sae_lens_atm.training.run import Result, train_checked
from sae_lens_atm.training.run_file import LanguageModelRun, Run, load_run, training_steps


def train_from_file(
    config: str,
    overrides: list[str],
    resume: Path | None = None,
    dry_run: bool = False,
    keep: int | None = None,
    extend: int = 0,
    threads: int | None = None,
) -> None:
    """Train an SAE, or estimate how long it takes, and print the results.

    Args:
        config: a run file, or the name of a shipped one.
        overrides: `key.subkey=value` pairs.
        resume: the folder of a run, or one of its checkpoints.
        dry_run: only check and estimate.
        keep: number of checkpoints to keep, the newest. None keeps all.
        extend: number of samples or tokens to train more than the file says.
        threads: number of torch's threads. None leaves it as it is.
    """
    use_threads(threads)
    console.quiet = rank() > 0
    run, checkpoint = load_run(config_path(config), overrides), None
    if extend and resume is None:
        raise SettingsError("--extend needs --resume with the folder of the run")
    if resume is not None:
        run = extended(run, extend)
        if not any(pair.startswith(("output_path=", "checkpoint_path=")) for pair in overrides):
            resume_in_place(run, resume)
            if is_already_trained(run, extend):
                console.print(
                    f"{run.runner.output_path} is already finished. "
                    "--extend N trains N samples or tokens more",
                    markup=False,
                )
                return
        checkpoint = newest_checkpoint(resume, run if extend else None)
    console.print(facts_table(check_run(run, checkpoint, dry_run, extend)))
    silence_saelens()
    if dry_run:
        _print_estimate(run, checkpoint)
        return
    command = ["train", config, *overrides]
    command += ["--keep", str(keep)] if keep else []
    command += ["--extend", str(extend)] if extend else []
    command += ["--threads", str(threads)] if threads else []
    warn_if_busy(run.runner.device, torch.get_num_threads())
    with (
        resume_hint(run, command, checkpoint),
        TrainingProgress(console, training_steps(run)) as progress,
    ):
        result = train_checked(
            run,
            checkpoint,
            progress.on_step,
            keep=keep,
            extend=extend,
            on_phase=progress.on_phase,
        )
    _print_result(result, isinstance(run, LanguageModelRun))


@contextmanager
def resume_hint(run: Run, arguments: list[str], resumed: Path | None = None) -> Generator[None]:
    """Print the command that resumes the run, when it is stopped or cannot be saved.

    Args:
        run: the run.
        arguments: the arguments of the command, without --resume.
        resumed: the checkpoint that the run was resumed from.
    """
    try:
        yield
    except Interrupted as stop:
        command = resume_command(run, arguments, stop.checkpoint)
        exit_with(f"{stop}; resume with: {command}", 128 + stop.signal_number)
    except SaveError as error:
        checkpoint = any_checkpoint(Path(run.runner.checkpoint_path or "")) or resumed
        then = "resume with" if checkpoint else "train again, as there is no checkpoint, with"
        command = resume_command(run, arguments, checkpoint)
        exit_with(f"{error}; free some space, then {then}: {command}", 1)


def resume_command(run: Run, arguments: list[str], checkpoint: Path | None) -> str:
    """Return the whole command that resumes a run from its folder or a checkpoint.

    Without a checkpoint it is the command that starts the run.
    """
    start = ["sae-lens-atm"]
    if size() > 1:
        processes = os.environ.get("LOCAL_WORLD_SIZE", str(size()))
        start = ["torchrun", "--nproc-per-node", processes, "-m", "sae_lens_atm"]
    if checkpoint is not None:
        output = Path(run.runner.output_path or "")
        is_inside = checkpoint.parent == output / "checkpoints"
        arguments = [*arguments, "--resume", str(output if is_inside else checkpoint)]
    return shlex.join([*start, *arguments])


def _print_estimate(run: Run, checkpoint: Path | None) -> None:
    with timing_status() as report:
        entries = estimate_time(run, checkpoint, report=report)
    console.print(estimate_table(entries, run.runner.device))


def estimate_table(entries: list[Entry], device: str) -> Table:
    """Return the phases of a run as a table, with their times and the total."""
    if device == "cpu":
        device = f"cpu, threads: {torch.get_num_threads()}"
    table = Table(
        title=f"Estimated time, from a few steps timed under the present load ({device})",
        title_justify="left",
    )
    table.add_column("phase")
    table.add_column("what")
    table.add_column("time", justify="right")
    phase = ""
    for entry in entries:
        time = "not timed" if entry.seconds is None else duration(entry.seconds)
        what = entry.what if entry.seconds is not None else f"{entry.what}: {entry.reason}"
        table.add_row(entry.phase if entry.phase != phase else "", what, time)
        phase = entry.phase
    timed = [entry.seconds for entry in entries if entry.seconds is not None]
    if timed:
        remark = "" if len(timed) == len(entries) else "without what was not timed"
        table.add_section()
        table.add_row("total", remark, duration(sum(timed)))
    return table


def _print_result(result: Result, language_model: bool) -> None:
    title = "on the language model" if language_model else "on fresh synthetic samples"
    if result.figures:
        console.print(figures_table(f"The saved SAE {title}", {"value": result.figures}))
    if result.saved_l0 == result.saved_l0:  # NaN if no step was taken
        console.print(
            f"L0 of the saved SAE on the last batch: {result.saved_l0:.2f} "
            f"({result.training_l0:.2f} in training)",
            highlight=False,
        )
    if result.skipped_batches:
        console.print(
            f"skipped {result.skipped_batches} batches with NaN, Inf or too large values",
            highlight=False,
        )
    console.print(f"saved {result.output_path} in {result.seconds:.0f} s")
