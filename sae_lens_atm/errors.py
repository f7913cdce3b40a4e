"""The errors that the package raises for its users to handle, and values in their messages."""

import reprlib
import signal
from pathlib import Path

_MOST_SHOWN = 300  # characters of a value in a message
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxlist, _repr.maxdict, _repr.maxtuple = 4, 8, 8, 8
_repr.maxstring = _repr.maxother = _repr.maxlong = _MOST_SHOWN


class SettingsError(ValueError):
    """A setting that cannot be used. The message names the key, the value and what is allowed."""


class CheckpointError(ValueError):
    """A checkpoint that training cannot resume from. The message says why."""


class Interrupted(Exception):
    """Training stopped because a signal or the caller asked for it.

    Its state is in `checkpoint`. It is None before the first step, for several runs that are
    trained at once, and for work other than training.
    """

    def __init__(self, checkpoint: Path | None, signal_number: int) -> None:
        saved = "" if checkpoint is None else f", saved {checkpoint}"
        super().__init__(f"stopped by {signal.Signals(signal_number).name}{saved}")
        self.checkpoint = checkpoint
        self.signal_number = signal_number


class NonFiniteBatchError(RuntimeError):
    """Too many steps in a row had a loss or gradients that are not finite.

    None of them changed the SAE. The message says whether the data or the training are at fault.
    """


class SaveError(OSError):
    """Files cannot be written, for example on a full disk. The message names the folder."""


class RankLostError(RuntimeError):
    """Another process of a distributed training has ended."""


class HubError(RuntimeError):
    """The Hub refused a request, or did not answer it."""


class SAEBenchError(RuntimeError):
    """SAEBench cannot be installed or run."""


# --- messages -------------------------------------------------------------------------------------


def shown(value: object) -> str:
    """Return a value as text for a message, cut to a readable length."""
    try:
        text = _repr.repr(value)
    except ValueError as error:  # a number with thousands of digits
        text = str(error)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line."""
    return " ".join(str(error).split())[: 10 * _MOST_SHOWN]


def with_type(error: BaseException) -> str:
    """Return the type and the message of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
