"""The L0 that `find-l0` found: `k: found` in run files, `l0: found` in comparison files.

`find-l0` writes a file with the L0 of each architecture. `found` reads the file in the folder of
the file's own search. A path in its place reads that file.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens_atm.data.model_identity import source_identity
from sae_lens_atm.errors import SettingsError, shown
from sae_lens_atm.files import hash_of, read_json
from sae_lens_atm.torchrun import rank

FILENAME = "found_l0.json"
FOUND = "found"
SCHEMA = 2
"""Answers of schema 1 have the L0 at which `c_dec` was least."""
# What the L0 depends on, beside the architecture. Devices and lengths are left out.
_DATA_FIELDS = (
    *("hierarchy_model", "synthetic_model", "model_name", "hook_name", "hook_head_index"),
    *("dataset_path", "context_size", "exclude_special_tokens", "seqpos_slice", "prepend_bos"),
)


def search_folder(output: str | Path) -> Path:
    """Return the folder of the search of a run, by default."""
    return Path(f"{output}-l0")


def key_of(content: Mapping[str, Any], architecture: str) -> str:
    """Return a hash of the architecture, the widths and the data, on which an L0 depends.

    Args:
        content: the content of a run file, or of a comparison file with the entry's own fields
            in `sae` (see `with_fields_of`).
        architecture: name in SAELens' registry.
    """
    sae = content.get("sae")
    widths = [sae.get(name) for name in ("d_in", "d_sae")] if isinstance(sae, dict) else []
    values = [content.get(name) for name in _DATA_FIELDS]
    data = [source_identity(value) if isinstance(value, str) else value for value in values]
    return hash_of([architecture, widths, data])


def with_fields_of(content: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a comparison file with the own fields of an entry in `sae`."""
    return {**content, "sae": {**(content.get("sae") or {}), **(entry.get("sae") or {})}}


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
    architecture = str(sae.get("architecture"))
    answers = FoundL0s("sae.k", k, output)
    return {**content, "sae": {**sae, "k": round(answers.of(content, architecture, architecture))}}


class FoundL0s:
    """The answers of a search.

    Args:
        field: the field of the file that asks for them, for messages.
        value: its value: `found`, or the path of a search's file.
        output: the output folder of the run or comparison.

    Raises:
        SettingsError: there is no such file.
    """

    def __init__(self, field: str, value: str, output: str | Path) -> None:
        self._asked = f"{field} is {shown(value)}"
        self._file = (
            search_folder(output) / FILENAME if value == FOUND else Path(value).expanduser()
        )
        try:
            self._found: Any = read_json(self._file)
        except (OSError, ValueError):  # a folder, or no JSON
            self._found = None
        if not isinstance(self._found, dict) or not self._found:
            raise SettingsError(
                f"{self._asked}, but {self._file} cannot be read: run `sae-lens-atm find-l0` with "
                "this file first"
            )
        if self._found.get("schema") != SCHEMA:
            raise SettingsError(
                f"{self._asked}, but {self._file} is of another version: run "
                "`sae-lens-atm find-l0` with this file again"
            )

    def of(self, content: Mapping[str, Any], entry: str, architecture: str) -> float:
        """Return the L0 of an entry.

        Args:
            content: the content of the file that asks.
            entry: name of the entry. In a run file it is the architecture.
            architecture: name in SAELens' registry.

        Raises:
            SettingsError: the search has no such entry, is of other data or another SAE, or found
                no peak.
        """
        answers = self._found.get("entries")
        answer = answers.get(entry) if isinstance(answers, dict) else None
        keys = self._found.get("keys")
        key = keys.get(entry) if isinstance(keys, dict) else None
        if not isinstance(answer, dict) or key != key_of(content, architecture):
            raise SettingsError(
                f"{self._asked}, but {self._file} has no answer for {shown(entry)} with this "
                "architecture, width, model, hook and data: run `sae-lens-atm find-l0` with this "
                "file"
            )
        l0 = float(answer["l0"])
        if answer.get("at_edge"):
            raise SettingsError(
                f"{self._asked}, but the search found no peak for {shown(entry)}: most bits are "
                f"saved at the end of the L0s tried, {l0:g}. Set a number, or search others with "
                "--l0 LOW,HIGH"
            )
        if answer.get("problems") and rank() == 0:
            reasons = "; ".join(answer["problems"])
            warnings.warn(
                f"{self._asked}, but the search is not sure of L0 {l0:.3g} for {shown(entry)}: "
                f"{reasons}",
                stacklevel=2,
            )
        return l0
