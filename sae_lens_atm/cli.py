"""The command line: a thin shell over the package.

Exit codes: 0 done, 1 failed while running, 2 bad input (one line on stderr for each thing that is
wrong), 130 and 143 stopped by SIGINT or SIGTERM, with a checkpoint.
"""

import os
import runpy
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from sae_lens.training import multi_sae_trainer, sae_trainer
from tqdm.auto import tqdm

from sae_lens_atm.checkpoints import CheckpointError
from sae_lens_atm.inspection import describe, load_sae
from sae_lens_atm.progress import Progress, figures_table
from sae_lens_atm.settings import LanguageModelRun, SettingsError, load_run, shipped_config
from sae_lens_atm.train import Result, plan, train
from sae_lens_atm.watch import Interrupted, NonFiniteBatchError

BAD_INPUT = 2
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train SAELens SAEs with Adaptive Temporal Masking, and look at them.",
)
console = Console()


def main() -> None:
    """The console command."""
    app()


@app.command("train")
def train_command(
    config: Annotated[str, typer.Argument(help="A run file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE or KEY.SUBKEY=VALUE; repeatable.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="A checkpoint, or a run's folder (its newest checkpoint).")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, print the plan, stop.")] = False,
) -> None:
    """Train the SAE of a run file."""
    with _clear_errors():
        path = Path(config)
        if not path.is_file() and path.suffix not in (".yaml", ".yml"):
            path = shipped_config(path.name)
        run = load_run(path, overrides or [])
        console.print(_facts_table(plan(run, resume)))
        if dry_run:
            return
        _silence_saelens_bars()
        with Progress(console, run.runner.total_training_steps) as progress:
            result = train(run, resume, progress.on_step)
        _print_result(result, isinstance(run, LanguageModelRun))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where to write.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option(help="A few seconds of it; learns nothing.")] = False,
) -> None:
    """Train ATM and SAELens' TopK on a small hierarchy of features, and compare them."""
    from sae_lens_atm.demo import demo_steps, run_demo

    with _clear_errors():
        _silence_saelens_bars()
        with Progress(console, demo_steps(quick)) as progress:
            result = run_demo(output, quick, progress.on_step)
    console.print(figures_table("ATM beside TopK, one seed", result.figures))
    console.print("One seed is an illustration, not a result. Lower absorption is better.")
    for path in result.files:
        console.print(f"wrote {path}")


@app.command()
def inspect(
    sae: Annotated[str, typer.Argument(help="A folder, or a Hub id: REPO:SAE_ID.")],
) -> None:
    """Show what a SAE is, where it comes from, and how important its latents are."""
    with _clear_errors():
        for table in describe(load_sae(sae)):
            console.print(table)


@app.command(
    "saelens",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def saelens(context: typer.Context) -> None:
    """SAELens' own training command line, which then knows `--architecture atm`."""
    module = "sae_lens.llm_sae_training_runner"
    sys.argv = [module, *context.args]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*found in sys.modules.*")
        runpy.run_module(module, run_name="__main__")


@contextmanager
def _clear_errors() -> Generator[None]:
    """Turn what a user can mend into one line on stderr and an exit code."""
    try:
        yield
    except Interrupted as stop:
        _exit(f"{stop}; go on with --resume {stop.checkpoint}", 128 + stop.signal_number)
    except KeyboardInterrupt:
        _exit("stopped", 130)
    except (SettingsError, CheckpointError) as error:
        _exit(str(error), BAD_INPUT)
    except NonFiniteBatchError as error:
        _exit(str(error), 1)
    except typer.Exit:
        raise
    except Exception as error:
        if os.environ.get("SAE_LENS_ATM_DEBUG"):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _exit(f"{reason} (SAE_LENS_ATM_DEBUG=1 shows where)", 1)


def _exit(message: str, code: int) -> NoReturn:
    for line in message.splitlines():
        typer.echo(f"error: {line}", err=True)
    raise typer.Exit(code)


def _silence_saelens_bars() -> None:
    """Our progress bar shows more; two bars would write over each other."""
    for module in (sae_trainer, multi_sae_trainer):
        setattr(module, "tqdm", partial(tqdm, disable=True))  # noqa: B010


def _facts_table(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(f"[dim]{name}", str(value))
    return table


def _print_result(result: Result, language_model: bool) -> None:
    title = "on the language model" if language_model else "on fresh synthetic samples"
    if result.figures:
        console.print(figures_table(f"The saved SAE {title}", {"value": result.figures}))
    console.print(f"saved {result.output_path} in {result.seconds:.0f} s")
