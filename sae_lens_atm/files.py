"""What a folder should hold, written into it last: sizes and checksums of its files.

A folder with a manifest that agrees is whole, whatever happened to the machine meanwhile.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any, cast

MANIFEST_FILENAME = "manifest.json"
_CHUNK = 2**20


def write_manifest(folder: Path, **facts: Any) -> None:
    """Put the files of a folder on the disk, and say there what they are, with some facts."""
    files = {
        path.name: {"bytes": path.stat().st_size, "crc32": _checksum(path, sync=True)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST_FILENAME
    }
    path = folder / MANIFEST_FILENAME
    path.write_text(json.dumps({**facts, "files": files}, indent=1), encoding="utf-8")
    _checksum(path, sync=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, if there is one.

    Raises:
        ValueError: there is something else in its place.
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


def what_is_wrong(folder: Path, closely: bool = True) -> str | None:
    """In what a folder differs from its manifest, if it has one; `closely` reads all of it."""
    try:
        manifest = read_manifest(folder)
        for name, entry in (manifest or {"files": {}})["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
            if closely and _checksum(path) != entry["crc32"]:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    return None


def _checksum(path: Path, sync: bool = False) -> int:
    total = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            total = zlib.crc32(chunk, total)
        if sync:
            os.fsync(file.fileno())
    return total
