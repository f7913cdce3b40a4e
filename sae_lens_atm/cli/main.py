"""The command line `sae-lens-atm`. Each command is a thin layer over the package."""

import runpy
import sys
import warnings
from importlib.metadata import entry_points
from typing import Any

import typer

from sae_lens_atm.cli.cache import cache
from sae_lens_atm.cli.compare import compare_command, evaluate, report, sweep
from sae_lens_atm.cli.lm import make_lm
from sae_lens_atm.cli.saes import inspect, push, saebench_command
from sae_lens_atm.cli.train import train_command

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, compare, inspect and publish SAELens SAEs with Adaptive Temporal Masking.",
)
app.command("train")(train_command)
app.command()(cache)
app.command("compare")(compare_command)
app.command()(sweep)
app.command()(report)
app.command()(evaluate)
app.command("saebench")(saebench_command)
app.command()(inspect)
app.command()(push)
app.command()(make_lm)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def saelens(context: typer.Context) -> None:
    """Run SAELens' own training command line, with `--architecture atm`."""
    module = "sae_lens.llm_sae_training_runner"
    sys.argv = [module, *context.args]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*found in sys.modules.*")
        runpy.run_module(module, run_name="__main__")


def main() -> None:
    """Run the command line."""
    warnings.formatwarning = _one_line_warning
    load_plugins()
    app(prog_name="sae-lens-atm")


def load_plugins() -> None:
    """Import the packages that register architectures with SAELens.

    SAELens does not look for plugins. These declare the entry point `sae_lens.architectures`.
    """
    for entry_point in entry_points(group="sae_lens.architectures"):
        entry_point.load()()


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"warning: {message}\n"
