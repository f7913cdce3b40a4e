"""The virtual environment of SAEBench, which needs other versions of libraries than SAELens."""

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
SAE_PROBES = "0.4.2"
REQUIREMENTS = "saebench-requirements.txt"
"""This file is written last. A folder that holds it is complete."""

# In the same versions as here, so that SAE and model compute the same.
_LIKE_OURS = ("torch", "sae-lens", "transformer-lens", "transformers")
_USED = ("scikit-learn<1.10", "beartype", "collectibles", "seaborn", "tabulate", "openai")
# sae-probes imports xgboost for a probe that SAEBench does not use. On Linux, xgboost itself comes
# with a GPU library of several hundred MB.
_USED_BY_SAE_PROBES = (
    "pandas<3",
    "pyarrow<26",
    "zstandard",
    "xgboost-cpu>=3.0.2,<4; sys_platform != 'darwin'",
    "xgboost>=3.0.2,<4; sys_platform == 'darwin'",
)
_WITHOUT_DEPENDENCIES = (f"sae-bench=={SAE_BENCH}", f"sae-probes=={SAE_PROBES}")


def requirements() -> list[str]:
    """Return the packages to install beside SAEBench and sae-probes themselves.

    SAEBench pins numpy<2 and torchvision, and needs neither. One dataset of its sparse probing is a
    script, which datasets 4 does not run. Both use an argument that scikit-learn 1.10 removed.
    """
    ours = [f"{name}=={version(name).partition('+')[0]}" for name in _LIKE_OURS]
    return [*ours, "datasets>=3.1,<4", *_USED, *_USED_BY_SAE_PROBES]


def default_folder() -> Path:
    """Return the folder in the user's cache: one for each set of versions."""
    digest = hashlib.sha256(_listed().encode()).hexdigest()[:8]
    return user_cache_path("sae-lens-atm") / f"saebench-{SAE_BENCH}-{digest}"


def is_complete(folder: Path) -> bool:
    """Return whether the environment is complete and has the present versions.

    Raises:
        SettingsError: it has other versions, or the folder is not an environment.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        versions = (folder / REQUIREMENTS).read_text(encoding="utf-8")
    except OSError:
        raise SettingsError(
            f"{folder} is not an environment that this command made: choose another folder"
        ) from None
    if versions != _listed():
        raise SettingsError(
            f"the environment {folder} was made for other versions of "
            f"{', '.join(_LIKE_OURS)}: delete it, or set another folder with --env"
        )
    return True


def _listed() -> str:
    python = ".".join(map(str, sys.version_info[:2]))
    return "\n".join([f"# Python {python}", *requirements(), *_WITHOUT_DEPENDENCIES]) + "\n"


def python_of(folder: Path) -> Path:
    """Return the Python of an environment."""
    inside = Path("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    return folder / inside


def prepare(folder: Path) -> None:
    """Make the environment if it is not complete, in a hidden folder that is renamed at the end.

    Raises:
        SettingsError: the folder holds something else.
        SAEBenchError: the installation failed.
    """
    folder = folder.absolute()
    if is_complete(folder):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not is_complete(folder):  # another process may have made it meanwhile
                _make(folder)
    except OSError as error:
        raise SAEBenchError(f"cannot make the environment {folder}: {error}") from error


def _make(folder: Path) -> None:
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        venv.create(partial, with_pip=True)
        _install(partial, *requirements())
        _install(partial, "--no-deps", *_WITHOUT_DEPENDENCIES)
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        raise SAEBenchError(
            f"cannot make the environment {folder}: exit code {error.returncode} of {command}"
        ) from error
    (partial / REQUIREMENTS).write_text(_listed(), encoding="utf-8")
    if folder.exists():
        folder.rmdir()  # it is empty, see `is_complete`
    partial.rename(folder)


def _install(folder: Path, *what: str) -> None:
    subprocess.run([python_of(folder), "-m", "pip", "install", *what], check=True)
