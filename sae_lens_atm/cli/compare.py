"""The work of the commands that train many SAEs, evaluate them and draw their results."""

from pathlib import Path

from huggingface_hub.utils import logging as hub_logging

from sae_lens_atm.cli.progress import BatchesProgress, RunsProgress, figures_table
from sae_lens_atm.cli.terminal import (
    config_path,
    console,
    exit_with,
    facts_table,
    timing_status,
)
from sae_lens_atm.cli.threads import use_threads, warn_if_busy
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
from sae_lens_atm.compare.report.notes import about_letters
from sae_lens_atm.compare.report.results import LetterFacts
from sae_lens_atm.compare.report.tables import (
    notes,
    row_tables,
    sweep_tables,
    test_table,
)
from sae_lens_atm.compare.run.processes import threads_per_job
from sae_lens_atm.errors import Interrupted
from sae_lens_atm.files import to_json, write_text
from sae_lens_atm.training.quiet import silence_saelens


def compare_file(
    config: str,
    overrides: list[str],
    jobs: int = 1,
    quick: bool = False,
    only_plan: bool = False,
    threads: int | None = None,
) -> None:
    """Carry out a comparison, or print its plan."""
    comparison = load_comparison(config_path(config), overrides, quick)
    _carry_out(comparison, jobs, only_plan, threads)


def sweep_file(
    config: str,
    overrides: list[str],
    jobs: int = 1,
    quick: bool = False,
    only_plan: bool = False,
    cluster: str | None = None,
    threads: int | None = None,
) -> None:
    """Carry out a sweep, or print its plan. `cluster` is the address of a Ray cluster."""
    absolute_paths = cluster is not None
    comparison = load_sweep(config_path(config), overrides, quick, absolute_paths)
    _carry_out(comparison, jobs, only_plan, threads, cluster)


def _carry_out(
    comparison: Comparison,
    jobs: int,
    only_plan: bool,
    threads: int | None,
    cluster: str | None = None,
) -> None:
    if only_plan:
        silence_saelens()
        with timing_status() as report:
            facts = dry_run(comparison, jobs, report, threads)
        console.print(facts_table(facts))
        return
    to_do = planned_jobs(comparison)
    if cluster is None:
        device = comparison.planned[0].run.runner.device
        warn_if_busy(device, threads or threads_per_job(jobs))
    try:
        with RunsProgress(console, to_do) as progress:
            results = compare(comparison, jobs, progress, cluster=cluster, threads=threads)
    except Interrupted:
        _print_and_write(summarise(comparison, {}), comparison.output)
        raise
    _print_and_write(results, comparison.output)
    if results.failed:
        lines = (f"{label}: {error}" for label, error in results.failed.items())
        exit_with("\n".join(lines), 1)


def draw_report(results: Path, folder: Path) -> None:
    """Draw the report of a `results.json` into a folder."""
    loaded = read_results(results)
    folder.mkdir(parents=True, exist_ok=True)
    _print_results(loaded, write_all(loaded, folder))


def evaluate_on_file(
    saes: list[str],
    config: str,
    overrides: list[str],
    json_file: Path | None,
    threads: int | None = None,
) -> None:
    """Evaluate saved SAEs on the data of a configuration file, and print or write the figures."""
    use_threads(threads)
    silence_saelens()
    hub_logging.set_verbosity_error()  # its client logs every retry; the last error is enough
    data = data_of(str(config_path(config)), overrides)
    with BatchesProgress(console, "evaluation") as progress:
        evaluated = evaluate_saved(
            saes,
            data,
            progress.named("first letters", "batches"),
            progress.named("probing tasks", "characters"),
            progress.on_batch,
        )
    figures = {name: found.figures for name, found in evaluated.items()}
    intervals = {name: found.intervals for name, found in evaluated.items()}
    console.print(figures_table(f"On the data of {config}", figures, intervals))
    letters = next(iter(evaluated.values())).letters
    if letters is not None:
        console.print(about_letters(LetterFacts(**letters)), style="dim", highlight=False)
    if json_file is not None:
        content = {name: found.as_json() for name, found in evaluated.items()}
        write_text(json_file, to_json(content))


def _print_and_write(results: Results, folder: Path) -> None:
    if results.runs:  # else results of an earlier call may be there: keep them
        _print_results(results, write_all(results, folder))


def _print_results(results: Results, files: list[Path]) -> None:
    for table in row_tables(results) if results.sweep is None else sweep_tables(results):
        console.print(table)
    console.print("  ".join(notes(results)), style="dim", highlight=False, markup=False)
    tests = test_table(results) if results.sweep is None else None
    if tests is not None:
        console.print(tests)
    for path in files:
        console.print(f"wrote {path}", highlight=False)
