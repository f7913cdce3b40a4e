"""SAEBench's own environment: it asks for versions of libraries that SAELens does not run with."""

import hashlib
import shutil
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from sae_lens_atm.errors import SAEBenchError, SettingsError

SAE_BENCH = "0.6.0"
REQUIREMENTS = "saebench-requirements.txt"
"""Written last: a folder with it is whole."""

_LIKE_OURS = (
    "torch",
    "sae-lens",
    "transformer-lens",
    "transformers",
)  # the same SAE, the same model
_USED = ("scikit-learn<1.10", "beartype", "collectibles", "seaborn", "tabulate", "openai")


def requirements() -> list[str]:
    """What is installed, SAEBench aside: what computes the SAE and the model, as it is here.

    SAEBench pins numpy<2 and torchvision, and needs neither; but one data set of its sparse probing
    is a script, which datasets 4 does not run, and scikit-learn 1.10 drops a word that it says.
    """
    ours = [f"{name}=={version(name).partition('+')[0]}" for name in _LIKE_OURS]
    return [*ours, "datasets>=3.1,<4", *_USED]


def default_folder() -> Path:
    """In the user's cache, one for each set of versions."""
    digest = hashlib.sha256(_listed().encode()).hexdigest()[:8]
    return user_cache_path("sae-lens-atm") / f"saebench-{SAE_BENCH}-{digest}"


def is_whole(folder: Path) -> bool:
    """Whether the environment is all there, and of the present versions.

    Raises:
        SettingsError: it is of other versions, or another thing.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = (folder / REQUIREMENTS).read_text(encoding="utf-8")
    except OSError:
        raise SettingsError(f"{folder} is not an environment that this command made") from None
    if found != _listed():
        raise SettingsError(
            f"the environment {folder} was made for other versions of "
            f"{', '.join(_LIKE_OURS)}: delete it, or name another with --env"
        )
    return True


def _listed() -> str:
    python = ".".join(map(str, sys.version_info[:2]))
    return "\n".join([f"# Python {python}", *requirements(), f"sae-bench=={SAE_BENCH}"]) + "\n"


def python_of(folder: Path) -> Path:
    inside = Path("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    return folder / inside


def prepare(folder: Path) -> None:
    """Make the environment, unless it is there: to the side, renamed when it is whole.

    Raises:
        SettingsError: the folder is something else.
        SAEBenchError: it cannot be made.
    """
    folder = folder.absolute()
    if is_whole(folder):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not is_whole(folder):  # another process may just have made it
                _make(folder)
    except OSError as error:
        raise SAEBenchError(f"cannot make the environment {folder}: {error}") from error


def _make(folder: Path) -> None:
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        venv.create(partial, with_pip=True)
        _install(partial, *requirements())
        _install(partial, "--no-deps", f"sae-bench=={SAE_BENCH}")
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        raise SAEBenchError(
            f"cannot make the environment {folder}: exit code {error.returncode} of {command}"
        ) from error
    (partial / REQUIREMENTS).write_text(_listed(), encoding="utf-8")
    if folder.exists():
        folder.rmdir()  # empty, or it would not have come to this
    partial.rename(folder)


def _install(folder: Path, *what: str) -> None:
    subprocess.run([python_of(folder), "-m", "pip", "install", *what], check=True)
