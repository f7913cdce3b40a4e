"""What all commands share: the console, errors and exit codes.

Exit codes: 0 success; 1 failed while running; 2 bad input, with one line on stderr for each
mistake; 130 and 143 stopped by SIGINT or SIGTERM.
"""

import os
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from sae_lens_atm.errors import (
    CheckpointError,
    HubError,
    Interrupted,
    NonFiniteBatchError,
    RankLostError,
    SAEBenchError,
    SaveError,
    SettingsError,
    with_type,
)
from sae_lens_atm.torchrun import is_main_of_node, rank
from sae_lens_atm.yaml_files import apply_overrides, read_yaml, shipped_config

BAD_INPUT = 2
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Set KEY=VALUE or KEY.SUBKEY=VALUE of the file. Repeatable."),
]
# Square brackets and colons in names and paths are no markup.
console = Console(markup=False, emoji=False)
if not console.is_terminal and "COLUMNS" not in os.environ:
    console = Console(markup=False, emoji=False, width=160)  # a log file has no width


@contextmanager
def clear_errors() -> Generator[None]:
    """Turn errors into lines on stderr and an exit code."""
    try:
        yield
    except Interrupted as stop:
        again = "the same command" if stop.checkpoint is None else f"--resume {stop.checkpoint}"
        exit_with(f"{stop}; resume with {again}", 128 + stop.signal_number)
    except KeyboardInterrupt:
        exit_with("stopped", 130)
    except (SettingsError, CheckpointError) as error:
        exit_with(str(error), BAD_INPUT)
    except (NonFiniteBatchError, RankLostError, HubError, SAEBenchError, SaveError) as error:
        exit_with(str(error), 1)
    except typer.Exit:
        raise
    except Exception as error:
        if os.environ.get("SAE_LENS_ATM_DEBUG"):
            raise
        reason = with_type(error)
        where = f"process {rank()}: " if rank() else ""
        hint = "set SAE_LENS_ATM_DEBUG=1 for the traceback"
        exit_with(f"{where}{reason} ({hint})", 1, on_every_rank=True)


def exit_with(message: str, code: int, on_every_rank: bool = False) -> NoReturn:
    """Print an error and end the command.

    Args:
        message: the error. Each of its lines becomes one line.
        code: the exit code.
        on_every_rank: print it on every rank, and not only on the main rank of a node.
    """
    for line in message.splitlines() if on_every_rank or is_main_of_node() else ():
        typer.echo(f"error: {line}", err=True)
    raise typer.Exit(code)


def config_path(config: str) -> Path:
    """Return the path of a configuration file, or of a shipped one by its name."""
    path = Path(config)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    return shipped_config(config)


def check_config(config: str, overrides: Iterable[str]) -> None:
    """Check what needs no knowledge of the keys: that there is a file of YAML, and the overrides.

    Raises:
        SettingsError: one line that says what is wrong.
    """
    apply_overrides(read_yaml(config_path(config)), overrides)


def facts_table(facts: dict[str, Any]) -> Table:
    """Return a table of names and values, one row each."""
    table = Table(show_header=False, box=None)
    table.add_column(style="dim")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table


@contextmanager
def timing_status() -> Generator[Callable[[str], None]]:
    """Show what is being timed. Yields the function that is called with its name."""
    with console.status("timing") as status:

        def report(what: str) -> None:
            status.update(f"timing: {what}")
            if not console.is_terminal:
                console.print(f"timing: {what}", highlight=False)

        yield report
