"""Files that are complete or absent: writing aside and renaming, JSON, manifests with checksums."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from sae_lens_atm.errors import RankLostError, SaveError, SettingsError, one_line, shown

MANIFEST_FILENAME = "manifest.json"
LOCK_FILENAME = ".lock"
_CHUNK = 2**20


def existing_parent(folder: Path) -> Path:
    """Return a folder if it exists, or else the nearest folder above it that does."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def check_writable(name: str, folder: Path) -> None:
    """Check that files can be written into a folder, which may be missing.

    Args:
        name: the setting or option, for the message.
        folder: the folder.

    Raises:
        SettingsError: they cannot.
    """
    try:
        existing = existing_parent(folder)
    except (OSError, ValueError) as error:  # not a path: too long, or with a null character
        raise SettingsError(
            f"{name} {shown(str(folder))} cannot be written: {error.args[-1]}"
        ) from error
    if not existing.is_dir():
        raise SettingsError(f"{name} {folder} cannot be written: {existing} is no folder")
    if not os.access(existing, os.W_OK):
        raise SettingsError(f"{name} {folder} cannot be written: {existing} is read-only")


def check_new_folder(name: str, folder: Path) -> None:
    """Check that a folder can be made, or is empty and can be replaced.

    Raises:
        SettingsError: it holds files, is the working folder, or cannot be written.
    """
    check_writable(name, folder)
    if folder.is_dir() and (any(folder.iterdir()) or folder.resolve() == Path.cwd()):
        raise SettingsError(f"{name} must be a new or an empty folder, got {str(folder)!r}")


def check_writable_file(name: str, file: Path | None) -> None:
    """Check that a file can be written into an existing folder. Do nothing without a file.

    Raises:
        SettingsError: it cannot.
    """
    if file is None:
        return
    check_writable(name, file.parent)
    if file.is_dir():
        raise SettingsError(f"{name} {file} cannot be written: it is a folder")
    if not file.parent.is_dir():
        raise SettingsError(f"{name} {file} cannot be written: there is no folder {file.parent}")


# --- errors and locks ----------------------------------------------------------------------------


@contextmanager
def saving(folder: Path) -> Generator[None]:
    """Turn any error while files are written into a SaveError that names the folder."""
    try:
        yield
    except (SaveError, RankLostError):
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError
        reason = one_line(error)
        if _disk_is_full(folder, error):
            reason = "No space left on the disk"
        raise SaveError(f"cannot save {folder}: {reason}") from error


def _disk_is_full(folder: Path, error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and torch pass on no error number.
    return "code: 28," in str(error) or shutil.disk_usage(existing_parent(folder)).free < _CHUNK


@contextmanager
def locked(folder: Path, name: str = "output_path") -> Generator[None]:
    """Make a folder, and lock it against other processes that write there.

    Args:
        folder: the folder.
        name: the setting that names it, for the message.

    Raises:
        SettingsError: another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILENAME)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise SettingsError(
            f"{name} is {folder}: another process is writing there, wait or choose another"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def turn(lock_file: Path, on_wait: Callable[[], None]) -> Generator[None]:
    """Hold a lock, after no other process holds it any more.

    Args:
        lock_file: the file of the lock.
        on_wait: is called every second while another process holds it. It may raise to stop.
    """
    lock = FileLock(lock_file)
    while True:
        try:
            lock.acquire(timeout=1)
            break
        except Timeout:
            on_wait()
    try:
        yield
    finally:
        lock.release()


# --- writing aside -------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> Path:
    """Write a file under a hidden name, then rename it. Return its path.

    Raises:
        SaveError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    with saving(path):
        try:
            partial.write_text(text, encoding="utf-8")
            return partial.replace(path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


@contextmanager
def saved_at_once(folder: Path, last: str = "cfg.json") -> Generator[Path]:
    """Yield a new hidden folder, and move the files written there into `folder` at the end.

    Args:
        folder: where the files go. It is made if it is missing.
        last: the file that is moved last. Without it `folder` does not count as complete.

    Raises:
        SaveError: a file cannot be written.
    """
    partial = folder / ".sae.partial"
    with saving(folder):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            for file in sorted(partial.iterdir(), key=lambda f: f.name == last):
                file.replace(folder / file.name)
            partial.rmdir()
        except BaseException:  # do not leave half an SAE on a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise


def replace_folder(partial: Path, folder: Path) -> None:
    """Give a complete folder its final name, in place of an older one.

    If the process ends in between, `restore_replaced` brings the older one back.
    """
    replaced = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(base: Path) -> None:
    """Rename a folder back if a process ended between the two renames of a replacement.

    Args:
        base: the folder that holds it.
    """
    for replaced in base.glob(".*.replaced"):
        original = base / replaced.name.removeprefix(".").removesuffix(".replaced")
        if not original.exists():
            with suppress(OSError):
                replaced.rename(original)


# --- JSON ----------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, or an empty dictionary if there is no such file.

    Raises:
        SettingsError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise SettingsError(
            f"{path} is not JSON ({one_line(error)}): replace or remove it"
        ) from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file aside and rename it, with `to_json(content, compact_lists=True)`."""
    write_text(path, to_json(content, compact_lists=True))


def to_json(value: Any, compact_lists: bool = False) -> str:
    """Return JSON text in which NaN and infinite numbers are null, since JSON has neither.

    Args:
        value: any value of plain Python types.
        compact_lists: write lists of numbers in one line, and numbers with six digits.
    """
    if not compact_lists:
        return json.dumps(_finite(value), indent=2)
    text = json.dumps(_finite(_rounded(value)), indent=1)
    return re.sub(r"\[[-+\d.e,\snul]*\]", lambda m: " ".join(m[0].split()), text)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_rounded(v) for v in cast(list[Any], value)]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_finite(v) for v in cast(list[Any], value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def hash_of(value: Any) -> str:
    """Return ten hexadecimal digits of the hash of a plain value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


# --- manifests -----------------------------------------------------------------------------------


def write_manifest(folder: Path, **facts: Any) -> None:
    """Flush the files of a folder to disk, and list their sizes and checksums in a manifest.

    Args:
        folder: the folder. Hidden files, and files in its subfolders, are not listed.
        facts: more entries of the manifest.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "crc32": _checksum(path, sync=True)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST_FILENAME and not path.name.startswith(".")
    }
    path = folder / MANIFEST_FILENAME
    path.write_text(json.dumps({**facts, "files": files}, indent=1), encoding="utf-8")
    _checksum(path, sync=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder, or None if it has none.

    Raises:
        ValueError: the file is not a manifest.
    """
    path = folder / MANIFEST_FILENAME
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    files = cast(Any, content).get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        raise ValueError(f"{MANIFEST_FILENAME} lists no files")
    for entry in cast(dict[str, Any], files).values():
        if not isinstance(entry, dict) or not {"bytes", "crc32"} <= cast(Any, entry).keys():
            raise ValueError(f"{MANIFEST_FILENAME} lists files without sizes or checksums")
    return cast(dict[str, Any], content)


def manifest_mismatch(folder: Path, checksums: bool = True) -> str | None:
    """Return how a folder differs from its manifest. None if it does not, or has no manifest.

    Args:
        folder: the folder.
        checksums: also read every file and compare its checksum.
    """
    try:
        manifest = read_manifest(folder)
        for name, entry in (manifest or {"files": {}})["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, expected {entry['bytes']}"
            if checksums and _checksum(path) != entry["crc32"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError) as error:
        return one_line(error)
    return None


def _checksum(path: Path, sync: bool = False) -> int:
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total = zlib.crc32(chunk, total)
        if sync:
            os.fsync(file.fileno())
    return total
