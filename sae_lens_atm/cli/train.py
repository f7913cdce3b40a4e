"""The command that trains one SAE."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from sae_lens_atm.cli.progress import Progress, figures_table
from sae_lens_atm.cli.terminal import Overrides, clear_errors, config_path, console, facts_table
from sae_lens_atm.training.checkpoints import newest_checkpoint
from sae_lens_atm.training.preflight.checks import check_run
from sae_lens_atm.training.preflight.estimate import estimate_time
from sae_lens_atm.training.preflight.timing import Entry, duration
from sae_lens_atm.training.quiet import silence_saelens
from sae_lens_atm.training.ranks import rank
from sae_lens_atm.training.run import Result, train_checked
from sae_lens_atm.training.run_file import LanguageModelRun, Run, load_run


def train_command(
    config: Annotated[str, typer.Argument(help="A run file, or the name of a shipped one.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="The same as --set.", metavar="[KEY=VALUE]...")
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Resume from a checkpoint, or from the newest one in a run's folder."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(help="Check everything, estimate memory, disk and time, and stop."),
    ] = False,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Keep only this many checkpoints, the newest.")
    ] = None,
) -> None:
    """Train an SAE from a run file.

    Ctrl-C saves a checkpoint after the current step. --resume continues from there.

    --dry-run times a few steps on this machine, for about 20 seconds.
    """
    console.quiet = rank() > 0
    with clear_errors():
        run = load_run(config_path(config), [*(settings or []), *(overrides or [])])
        checkpoint = None if resume is None else newest_checkpoint(resume)
        console.print(facts_table(check_run(run, checkpoint, dry_run)))
        silence_saelens()
        if dry_run:
            _print_estimate(run, checkpoint)
            return
        with Progress(console, run.runner.total_training_steps) as progress:
            result = train_checked(run, checkpoint, progress.on_step, keep=keep)
        _print_result(result, isinstance(run, LanguageModelRun))


def _print_estimate(run: Run, checkpoint: Path | None) -> None:
    with console.status("timing") as status:

        def report(what: str) -> None:
            status.update(f"timing: {what}")
            if not console.is_terminal:
                console.print(f"timing: {what}", highlight=False)

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
    if result.skipped_batches:
        console.print(
            f"skipped {result.skipped_batches} batches with NaN, Inf or too large values",
            highlight=False,
        )
    console.print(f"saved {result.output_path} in {result.seconds:.0f} s")
