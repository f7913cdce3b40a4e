"""The L0 that `find-l0` found, in run files: `k: found`.

`find-l0` writes a file with the L0 of each architecture. A run file whose `sae.k` is `found` reads
the file in the folder of its own search. With a path as `sae.k` it reads that file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens_atm.errors import SettingsError, shown
from sae_lens_atm.files import hash_of, read_json

FILENAME = "found_l0.json"
FOUND = "found"
# What the L0 depends on, beside the architecture. Paths, devices and lengths are left out.
_DATA_FIELDS = (
    *("hierarchy_model", "synthetic_model", "model_name", "hook_name", "hook_head_index"),
    *("dataset_path", "context_size"),
)


def search_folder(output: str | Path) -> Path:
    """Return the folder of the search of a run, by default."""
    return Path(f"{output}-l0")


def key_of(content: Mapping[str, Any], architecture: str) -> str:
    """Return a hash of the architecture, the widths and the data, on which an L0 depends.

    Args:
        content: the content of a run file or comparison file.
        architecture: name in SAELens' registry.
    """
    sae = content.get("sae")
    widths = [sae.get(name) for name in ("d_in", "d_sae")] if isinstance(sae, dict) else []
    return hash_of([architecture, widths, [content.get(name) for name in _DATA_FIELDS]])


def with_found_k(content: Mapping[str, Any], output: str) -> dict[str, Any]:
    """Return the content of a run file with the L0 that was found in place of `k: found`.

    Args:
        content: the content.
        output: the output folder of the run.

    Raises:
        SettingsError: there is no such file, or it is of other data or another SAE.
    """
    sae = content.get("sae")
    k = sae.get("k") if isinstance(sae, dict) else None
    if not isinstance(k, str) or not isinstance(sae, dict):
        return dict(content)
    file = search_folder(output) / FILENAME if k == FOUND else Path(k).expanduser()
    architecture = str(sae.get("architecture"))
    found = read_json(file)
    if not found:
        raise SettingsError(
            f"sae.k is {shown(k)}, but {file} cannot be read: run `sae-lens-atm find-l0` with this "
            "file first"
        )
    answers = found.get("entries")
    answer = answers.get(architecture) if isinstance(answers, dict) else None
    if not isinstance(answer, dict) or found.get("keys", {}).get(architecture) != key_of(
        content, architecture
    ):
        raise SettingsError(
            f"sae.k is {shown(k)}, but {file} is of another architecture, width, model, hook or "
            "data: run `sae-lens-atm find-l0` with this file"
        )
    l0 = float(answer["l0"])
    return {**content, "sae": {**sae, "k": round(l0)}}
