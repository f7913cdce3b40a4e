"""What identifies the activations of a language model at a hook, for files that store them."""

import hashlib
import re
from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig

_BLOCKS, _BLOCK_BYTES = 16, 2**16
_UNREAD = re.compile(r"(readme|license|notice)\b.*|.*\.png|(state|dataset_info)\.json", re.I)
"""Names of files that do not change the content. `save_to_disk` puts random numbers into the last
two."""
_MAPPED = re.compile(r"cache-.*\.arrow|tmp[a-z0-9_]{8}")
"""Names of the files that `Dataset.map` writes into the folder of its data set."""


def model_identity(cfg: LanguageModelSAERunnerConfig[Any]) -> dict[str, Any]:
    """Return the facts that determine the activations which a run reads, on given tokens.

    Two runs with the same identity read the same activations, up to rounding. A model in a local
    folder is identified by its files, not by its path.
    """
    return {
        "model_name": source_identity(cfg.model_name),
        "model_class_name": cfg.model_class_name,
        "model_from_pretrained_kwargs": _plain(cfg.model_from_pretrained_kwargs),
        "model_kwargs": _plain(cfg.model_kwargs),
        "autocast_lm": cfg.autocast_lm,
        "hook_name": cfg.hook_name,
        "hook_head_index": cfg.hook_head_index,
    }


def source_identity(source: str) -> str:
    """Return a name on the Hub as it is, and the fingerprint of a local folder or file."""
    path = Path(source)
    return fingerprint(path) if path.exists() else source


def fingerprint(path: Path) -> str:
    """Return a hash of the files in a folder: their names, sizes and parts of their content.

    Of each file, 16 blocks of 64 KiB at even distances are read, so large models take no time.
    """
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        if _MAPPED.fullmatch(file.name) or _UNREAD.fullmatch(file.name):
            continue
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        size = file.stat().st_size
        digest.update(f"{name} {size} ".encode())
        with file.open("rb") as content:
            for block in range(_BLOCKS):
                content.seek(max(size - _BLOCK_BYTES, 0) * block // (_BLOCKS - 1))
                digest.update(content.read(_BLOCK_BYTES))
                if size <= _BLOCK_BYTES:
                    break
    return f"sha256:{digest.hexdigest()[:20]}"


def _plain(values: dict[str, Any] | None) -> dict[str, str]:
    return {name: str(value) for name, value in sorted((values or {}).items())}
