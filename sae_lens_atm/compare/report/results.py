"""What a comparison found, as `results.json` holds it: every setting, every run, the summary.

The file is read back through these schemas, so a report can be redrawn from it alone.
"""

import csv
import math
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.files import to_json, write_text

SCHEMA_VERSION: Final = 2
Role = Literal["candidate", "baseline", "control"]
Figures = dict[str, float | None]
"""Figures by name; None where there was nothing to take a mean over."""


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Entry(_Schema):
    """One kind of SAE in the comparison."""

    architecture: str
    role: Role
    l0_knob: str
    """The setting that was turned to reach the L0 asked for."""
    settings: dict[str, Any]
    """Everything it was trained with, but for what differs from run to run."""


class Curve(_Schema):
    """What was seen along the way of one run; all lists are as long as `steps`."""

    steps: list[int]
    explained_variance: list[float | None]
    l0: list[float | None]
    dead_latents: list[float | None]
    """Latents that were silent for the dead-feature window of the training (in the figures: in all
    samples of the evaluation)."""
    absorption_fraction: list[float | None] = []
    """Empty without a known hierarchy of features."""
    coefficient: list[float | None] = []
    """The coefficient that the L0 controller turned; empty without one."""


class Importance(_Schema):
    """Quartiles of the importance of the latents of each group of features, and the threshold."""

    steps: list[int]
    threshold: list[float | None]
    groups: dict[str, list[list[float | None]]]
    """Of each group, a (low, median, high) for each step."""
    latents: dict[str, int]
    """How many latents each group has."""


class Run(_Schema):
    """One trained (or, as a control, untrained) SAE."""

    entry: str
    l0_target: float
    seed: int
    model_seed: int | None = None
    """Of the language model, where a comparison makes several."""
    figures: Figures
    matched: bool
    """Whether the L0 measured is within 5% of the target."""
    moving: bool
    """Whether explained variance or dead latents still moved at the end."""
    curve: Curve | None = None
    importance: Importance | None = None
    absorption_by_parent: list[float | None] = []
    """Absorbed fraction of each of `Results.parents`."""
    cosine_map: str = ""
    """PNG in base64: cosine of decoder rows (down) and true features (across); one run an entry."""
    folder: str = ""


class Spread(_Schema):
    """Mean and standard deviation (of the sample) over `n` runs (for stability, pairs of them)."""

    mean: float | None
    sd: float | None
    n: int


class Row(_Schema):
    """The runs of one entry at one L0."""

    entry: str
    l0_target: float
    seeds: list[int]
    matched: bool
    moving: bool
    figures: dict[str, Spread]


class Test(_Schema):
    """A candidate beside the best baseline in one figure at one L0, paired by seed."""

    candidate: str
    l0_target: float
    figure: str
    baseline: str
    difference: float | None
    """Mean over seeds of the candidate's figure less the baseline's."""
    better: bool | None
    """Whether the difference is to the figure's better side; None if there is none."""
    p: float | None
    """Two-sided paired t test over `n` seeds; None with fewer than two, or no spread."""
    n: int
    """Seeds; for stability pairs of them; where there are several language models, models."""
    off_target: list[str] = []
    """Baselines that do better than `baseline`, but at another L0 than was asked for."""


class Parent(_Schema):
    """A feature that has children."""

    feature: int
    depth: int
    """0 for a root."""
    probability: float | None
    """How often it was active in the samples of the evaluation."""


class Point(_Schema):
    """Where an entry of a sweep lies."""

    entry: str
    """What was swept."""
    values: dict[str, Any]
    """Of the swept fields, such as `lr` and `sae.mask_rate`."""


class Sweep(_Schema):
    """A comparison whose entries are points of a sweep."""

    objective: str
    """The figure that the best points are told by."""
    points: dict[str, Point]
    """By entry."""


class Results(_Schema):
    """A whole comparison."""

    schema_version: Literal[2] = SCHEMA_VERSION
    name: str
    created: str
    quick: bool = False
    versions: dict[str, str]
    machine: dict[str, str]
    config: dict[str, Any]
    """The comparison file, overrides applied."""
    not_ranked: list[str] = Field(default_factory=list)
    """Figures that are reported, and of which none is called the best."""
    entries: dict[str, Entry]
    runs: list[Run]
    rows: list[Row]
    tests: list[Test]
    parents: list[Parent] = Field(default_factory=list)
    failed: dict[str, str] = Field(default_factory=dict)
    """Runs that ended in an error, and which."""
    sweep: Sweep | None = None


def write_results(results: Results, folder: Path) -> list[Path]:
    """Write `results.json` and `results.csv`, each to the side first."""
    json_path, csv_path = folder / "results.json", folder / "results.csv"
    write_text(json_path, to_json(results.model_dump(), compact_lists=True))
    with (folder / ".results.csv.partial").open("w", newline="", encoding="utf-8") as file:
        figures = list(dict.fromkeys(name for run in results.runs for name in run.figures))
        table = csv.writer(file)
        head = [
            "entry",
            "role",
            "architecture",
            "l0_target",
            "model_seed",
            "seed",
            "matched",
            "moving",
        ]
        table.writerow([*head, *figures])
        for run in results.runs:
            entry = results.entries[run.entry]
            facts = [
                run.entry,
                entry.role,
                entry.architecture,
                run.l0_target,
                run.model_seed,
                run.seed,
            ]
            values = [_or_none(run.figures.get(name)) for name in figures]
            table.writerow([*facts, run.matched, run.moving, *values])
    (folder / ".results.csv.partial").replace(csv_path)
    return [json_path, csv_path]


def _or_none(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def read_results(path: str | Path) -> Results:
    """Read a `results.json`.

    Raises:
        SettingsError: it is none, or of another schema.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        return Results.model_validate_json(text)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except (ValidationError, UnicodeDecodeError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise SettingsError(
            f"{path} is no results.json of schema {SCHEMA_VERSION} ({reason})"
        ) from error
