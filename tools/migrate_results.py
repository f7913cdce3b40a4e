"""Convert results.json files from schema 2 to schema 3, in place.

    python tools/migrate_results.py docs/*/results.json
    python tools/migrate_results.py --summary-only benchmarks/study/results/*.json

Schema 3 renames `l0_knob` to `l0_parameter`. The pictures of cosines are removed, as they take most
of a file and no page of the documentation shows them. Other JSON files are left unchanged.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_lens_atm.compare.report.results import (
    SCHEMA_VERSION,
    Results,
    results_json,
)
from sae_lens_atm.files import write_text


def migrate(content: dict[str, Any], summary_only: bool = False) -> dict[str, Any]:
    """Return the content of a results.json of schema 2 or 3 in schema 3, without pictures.

    Args:
        content: the parsed JSON.
        summary_only: keep no values that no table of the documentation reads: the curves,
            importance over training, intervals of single runs, absorption of each parent, and
            probing by task.
    """
    entries = {name: _migrate_entry(entry) for name, entry in content["entries"].items()}
    config = dict(content["config"])
    if isinstance(config.get("architectures"), dict):
        config["architectures"] = {
            name: _migrate_entry(entry) for name, entry in config["architectures"].items()
        }
    removed: dict[str, Any] = {"cosine_map": ""}
    if summary_only:
        removed |= {"curve": None, "importance": None, "intervals": {}}
        removed |= {"absorption_by_parent": [], "by_task": {}}
    runs = [{**run, **removed} for run in content["runs"]]
    version = {"schema_version": SCHEMA_VERSION}
    return {**content, **version, "config": config, "entries": entries, "runs": runs}


def _migrate_entry(entry: Any) -> Any:
    """Rename `l0_knob: l1, steered` to `l0_parameter: l1, controlled`."""
    if not isinstance(entry, dict):  # an entry of a comparison file may be empty
        return entry
    renamed = {"l0_parameter" if key == "l0_knob" else key: value for key, value in entry.items()}
    parameter = renamed.get("l0_parameter")
    if isinstance(parameter, str):
        renamed["l0_parameter"] = parameter.replace(", steered", ", controlled")
    return renamed


def main(
    files: list[Path],
    summary_only: Annotated[
        bool, typer.Option(help="Keep no values that no table of the documentation reads.")
    ] = False,
) -> None:
    """Convert results.json files from schema 2 to schema 3, in place."""
    for path in files:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("schema_version") not in (2, SCHEMA_VERSION):
            print(f"{path}: not a results.json of schema 2 or 3, unchanged")
            continue
        before = path.stat().st_size
        results = Results.model_validate(migrate(content, summary_only))
        write_text(path, results_json(results))
        print(f"{path}: {before:,} -> {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    typer.run(main)
