"""The commands that train many SAEs, evaluate them and draw their results."""

from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub.utils import logging as hub_logging

from sae_lens_atm.cli.progress import RunsProgress, figures_table
from sae_lens_atm.cli.terminal import (
    Overrides,
    clear_errors,
    config_path,
    console,
    exit_with,
    facts_table,
)
from sae_lens_atm.compare import (
    Comparison,
    Results,
    compare,
    dry_run,
    load_comparison,
    planned_jobs,
    read_results,
    summarise,
    write_all,
)
from sae_lens_atm.compare.evaluate_saved import data_of, evaluate_saved
from sae_lens_atm.compare.plan.sweep_file import load_sweep
from sae_lens_atm.compare.report.tables import (
    MARKS,
    SWEEP_MARKS,
    row_tables,
    sweep_tables,
    test_table,
)
from sae_lens_atm.errors import Interrupted
from sae_lens_atm.files import check_writable, check_writable_file, to_json
from sae_lens_atm.training.quiet import silence_saelens

Jobs = Annotated[int, typer.Option(min=1, help="Number of processes.")]
Quick = Annotated[bool, typer.Option(help="Apply the settings under `quick` in the file.")]
OnlyPlan = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print the plan and its time, and stop.")
]


def compare_command(
    config: Annotated[str, typer.Argument(help="A comparison file, or the name of a shipped one.")],
    overrides: Overrides = None,
    jobs: Jobs = 1,
    quick: Quick = False,
    only_plan: OnlyPlan = False,
) -> None:
    """Train several architectures at the same L0, and report how they differ.

    Finished runs are kept. The same command resumes after an interruption. After a change of the
    file it trains only the runs that changed.
    """
    with clear_errors():
        _carry_out(load_comparison(config_path(config), overrides or [], quick), jobs, only_plan)


def sweep(
    config: Annotated[str, typer.Argument(help="A sweep file, or the name of a shipped one.")],
    overrides: Overrides = None,
    jobs: Jobs = 1,
    quick: Quick = False,
    only_plan: OnlyPlan = False,
    ray: Annotated[
        str | None,
        typer.Option(help="Run on a Ray cluster: its address, `auto`, or `local` for a new one."),
    ] = None,
) -> None:
    """Train SAEs at many settings, on a grid or at random, and report the best.

    Finished runs are kept, and the same command resumes, as in `compare`.
    """
    with clear_errors():
        absolute_paths = ray is not None
        comparison = load_sweep(config_path(config), overrides or [], quick, absolute_paths)
        _carry_out(comparison, jobs, only_plan, ray)


def _carry_out(
    comparison: Comparison, jobs: int, only_plan: bool, cluster: str | None = None
) -> None:
    if only_plan:
        silence_saelens()
        console.print(facts_table(dry_run(comparison, jobs)))
        return
    to_do = planned_jobs(comparison)
    try:
        with RunsProgress(console, len(to_do), sum(job.steps for job in to_do)) as progress:
            results = compare(comparison, jobs, progress, cluster=cluster)
    except Interrupted:
        _print_and_write(summarise(comparison, {}), comparison.output)
        raise
    _print_and_write(results, comparison.output)
    if results.failed:
        lines = (f"{label}: {error}" for label, error in results.failed.items())
        exit_with("\n".join(lines), 1)


def report(
    results: Annotated[Path, typer.Argument(help="The results.json of a comparison or sweep.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the report. By default the folder of the file.")
    ] = None,
) -> None:
    """Draw the report of a comparison or sweep again."""
    with clear_errors():
        loaded = read_results(results)
        folder = output or results.parent
        check_writable("--output", folder)
        folder.mkdir(parents=True, exist_ok=True)
        _print_results(loaded, write_all(loaded, folder))


def evaluate(
    saes: Annotated[list[str], typer.Argument(help="Folders, or REPO:SAE_ID on the Hub.")],
    on: Annotated[
        str,
        typer.Option(help="A run, comparison or sweep file, or the name of a shipped one."),
    ],
    overrides: Overrides = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures to this file.")
    ] = None,
) -> None:
    """Evaluate saved SAEs on the data of a configuration file."""
    with clear_errors():
        check_writable_file("--json", json_file)
        silence_saelens()
        hub_logging.set_verbosity_error()  # its client logs every retry; the last error is enough
        figures = evaluate_saved(saes, data_of(str(config_path(on)), overrides or []))
        console.print(figures_table(f"On the data of {on}", figures))
        if json_file is not None:
            json_file.write_text(to_json(figures), encoding="utf-8")


def _print_and_write(results: Results, folder: Path) -> None:
    if results.runs:  # else results of an earlier call may be there: keep them
        _print_results(results, write_all(results, folder))


def _print_results(results: Results, files: list[Path]) -> None:
    for table in row_tables(results) if results.sweep is None else sweep_tables(results):
        console.print(table)
    console.print(MARKS if results.sweep is None else SWEEP_MARKS, style="dim", highlight=False)
    tests = test_table(results) if results.sweep is None else None
    if tests is not None:
        console.print(tests)
    for path in files:
        console.print(f"wrote {path}", highlight=False)
