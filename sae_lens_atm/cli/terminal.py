"""What every command prints, and how it ends.

Exit codes: 0 done, 1 failed while running, 2 bad input (one line on stderr for each thing that is
wrong), 130 and 143 stopped by SIGINT or SIGTERM, with a checkpoint.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from sae_lens_atm import saebench
from sae_lens_atm.errors import (
    CheckpointError,
    HubError,
    Interrupted,
    NonFiniteBatchError,
    RankLostError,
    SettingsError,
)
from sae_lens_atm.training.ranks import is_main_of_node, rank
from sae_lens_atm.training.run_file import shipped_config

BAD_INPUT = 2
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE or KEY.SUBKEY=VALUE; repeatable.")
]
"""Settings of a command that change those of its file."""
console = Console()
if not console.is_terminal and "COLUMNS" not in os.environ:
    console = Console(width=160)  # a log has no width of its own


@contextmanager
def clear_errors() -> Generator[None]:
    """Turn what a user can mend into one line on stderr and an exit code."""
    try:
        yield
    except Interrupted as stop:
        again = "the same command" if stop.checkpoint is None else f"--resume {stop.checkpoint}"
        exit_with(f"{stop}; go on with {again}", 128 + stop.signal_number)
    except KeyboardInterrupt:
        exit_with("stopped", 130)
    except (SettingsError, CheckpointError) as error:
        exit_with(str(error), BAD_INPUT)
    except (NonFiniteBatchError, RankLostError, HubError, saebench.SAEBenchError) as error:
        exit_with(str(error), 1)
    except typer.Exit:
        raise
    except Exception as error:
        if os.environ.get("SAE_LENS_ATM_DEBUG"):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        where = f"process {rank()}: " if rank() else ""
        exit_with(f"{where}{reason} (SAE_LENS_ATM_DEBUG=1 shows where)", 1, everywhere=True)


def exit_with(message: str, code: int, everywhere: bool = False) -> NoReturn:
    """End the command."""
    for line in message.splitlines() if everywhere or is_main_of_node() else ():
        typer.echo(f"error: {line}", err=True)
    raise typer.Exit(code)


def config_path(config: str) -> Path:
    """A file, or the one of a name that comes with the package."""
    path = Path(config)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path
    return shipped_config(path.name)


def facts_table(facts: dict[str, Any]) -> Table:
    """Names and values, a line each."""
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(f"[dim]{name}", str(value))
    return table
