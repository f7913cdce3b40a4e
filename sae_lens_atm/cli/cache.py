"""The work of the command that caches the activations of a language model."""

import time
from pathlib import Path
from typing import Any

import datasets
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sae_lens_atm.cli.terminal import (
    config_path,
    console,
    exit_with,
    facts_table,
)
from sae_lens_atm.compare.plan.any_file import runs_in
from sae_lens_atm.data.activation_cache import CacheSettings
from sae_lens_atm.data.cache_writer import (
    CachePlan,
    check_cache_folder,
    is_complete,
    plan_cache,
)
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.files import manifest_mismatch
from sae_lens_atm.training.cached_run import cache_activations, open_cache
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.preflight.checks import check_dataset_exists, check_devices
from sae_lens_atm.training.preflight.lookups import check_files, look_up
from sae_lens_atm.training.preflight.memory import size_text
from sae_lens_atm.training.preflight.timing import time_left
from sae_lens_atm.training.quiet import silence_saelens
from sae_lens_atm.training.run_file import LanguageModelRun

_SECONDS_PER_LINE = 10.0  # without a terminal


def cache_of_file(config: str, overrides: list[str], only_plan: bool, check: bool) -> None:
    """Write the activations of a language model to disk.

    Args:
        config: a run, comparison or sweep file, or the name of a shipped one.
        overrides: `key.subkey=value` pairs.
        only_plan: print what would be written, and stop.
        check: compare the files with their checksums, and stop.
    """
    run, settings = _longest_run(str(config_path(config)), overrides)
    folder, plan = settings.folder, plan_cache(run.runner, settings)
    if check:
        _check(run, folder)
        return
    done = check_cache_folder(run.runner, settings, plan)
    check_dataset_exists(run.runner)
    check_files(run.runner)
    facts = _facts(run, plan, folder, done)
    console.print(facts_table(facts | look_up(run.runner) if only_plan else facts))
    if only_plan:
        return
    if is_complete(folder):
        open_cache(run)
        console.print(f"{folder} is already complete", highlight=False)
        return
    check_devices(run)
    silence_saelens()
    datasets.disable_progress_bars()
    _write(run)
    console.print(f"saved {folder}", highlight=False)


def _longest_run(path: str, overrides: list[str]) -> tuple[LanguageModelRun, CacheSettings]:
    runs = [run for run in runs_in(path, overrides) if isinstance(run, LanguageModelRun)]
    if not runs:
        raise SettingsError("runner must be 'language_model', got 'synthetic'")
    run = max(runs, key=lambda r: r.runner.training_tokens)
    if run.activations is None:
        raise SettingsError(
            "activations.cache: missing, set it in the file or with --set activations.cache=FOLDER"
        )
    return run, run.activations


def _facts(run: LanguageModelRun, plan: CachePlan, folder: Path, done: int) -> dict[str, Any]:
    cfg = run.runner
    return {
        "model": f"{cfg.model_name} at {cfg.hook_name}",
        "dataset": cfg.dataset_path,
        "tokens": f"{plan.contexts * cfg.context_size:,} in {plan.contexts:,} contexts of "
        f"{cfg.context_size:,}",
        "size": f"{size_text(plan.bytes)} in {plan.files} files"
        + (f", {done} of them complete" if done else ""),
        "folder": folder,
    }


def _check(run: LanguageModelRun, folder: Path) -> None:
    open_cache(run)
    problem = manifest_mismatch(folder)
    if problem is not None:
        exit_with(f"activations.cache {folder} is damaged: {problem}", 1)
    console.print(f"{folder}: all files match their checksums", highlight=False)


def _write(run: LanguageModelRun) -> None:
    stop, last = StopFlag(), 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    begun: tuple[float, int] | None = None
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
        stop.on_signals(),
    ):
        task = bar.add_task("loading the model", total=None)
        if not console.is_terminal:
            console.print("loading the model")

        def on_progress(done: int, contexts: int) -> None:
            nonlocal last, begun
            stop.check()
            now = time.monotonic()
            begun = begun or (now, done)
            bar.update(task, description="contexts", completed=done, total=contexts)
            if console.is_terminal or (now - last < _SECONDS_PER_LINE and done < contexts):
                return
            last, rate = now, (done - begun[1]) / max(now - begun[0], 1e-9)
            left = f", {time_left((contexts - done) / rate)}" if rate else ""
            speed = f", {rate * run.runner.context_size:,.0f} tokens/s" if rate else ""
            console.print(f"{done:,} of {contexts:,} contexts{speed}{left}", highlight=False)

        cache_activations(run, on_progress)
