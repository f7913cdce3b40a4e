"""The command line `sae-lens-atm`. Each command is a thin layer over the package."""

import warnings
from typing import Any

import typer

from sae_lens_atm.cli import commands

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train, compare, inspect and publish SAELens SAEs with Adaptive Temporal Masking.",
)
app.command()(commands.train)
app.command()(commands.cache)
app.command()(commands.compare)
app.command()(commands.sweep)
app.command()(commands.find_l0)
app.command()(commands.report)
app.command()(commands.evaluate)
app.command()(commands.saebench)
app.command()(commands.explore)
app.command()(commands.inspect)
app.command()(commands.push)
app.command()(commands.make_lm)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(commands.saelens)


def main() -> None:
    """Run the command line."""
    warnings.formatwarning = _one_line_warning
    app(prog_name="sae-lens-atm")


def _one_line_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    return f"warning: {message}\n"
