"""The schema of `results.json`: the settings, every run, and the summary over seeds.

The file is read back through this schema. A report can be drawn from the file alone.
"""

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any, Final, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.files import to_json, write_text

SCHEMA_VERSION: Final = 3
Role = Literal["candidate", "baseline", "control"]
Figures = dict[str, float | None]
"""Figures by name. None: there were no values to average."""
Interval = tuple[float | None, float | None]
"""Low and high end. None: there were no values to average."""


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Entry(_Schema):
    """An entry of the comparison: an architecture with its settings."""

    architecture: str
    role: Role
    l0_parameter: str
    """The parameter that sets the L0."""
    found_l0: float | None = None
    """The target L0, if it is the one that the search found for this entry."""
    settings: dict[str, Any]
    """Training settings, without those that differ between the runs of the entry."""


class Curve(_Schema):
    """Figures of one run during training, one value for each of `steps`."""

    steps: list[int]
    explained_variance: list[float | None]
    l0: list[float | None]
    dead_latents: list[float | None]
    """Latents that fire on no sample of the last `dead_feature_window` steps.

    For the figure of the same name the window is the evaluation."""
    decoder_cosine: list[float | None] = []
    """`c_dec` of the latents that fired in the last 100 steps. Empty in older files."""
    saved_bits: list[float | None] = []
    """Empty in older files."""
    absorption_fraction: list[float | None] = []
    """Empty on data without a known hierarchy of features."""
    coefficient: list[float | None] = []
    """The coefficient that the L0 controller adjusts. Empty without a controller."""


class Importance(_Schema):
    """Importance of the latents during training: quartiles of each group, and the threshold."""

    steps: list[int]
    threshold: list[float | None]
    groups: dict[str, list[list[float | None]]]
    """For each group one (lower quartile, median, upper quartile) a step."""
    latents: dict[str, int]
    """Number of latents in each group."""


FOUND_LEVEL = 0.0
"""In place of the target L0, if each entry has the L0 that the search found for it."""


class Run(_Schema):
    """One SAE: trained, or left untrained as a control."""

    entry: str
    l0_target: float
    seed: int
    model_seed: int | None = None
    """Seed of the language model, if the comparison makes several."""
    figures: Figures
    matched: bool
    """Whether the measured L0 is within 5% of the target."""
    moving: bool
    """Whether explained variance or dead latents still changed at the end of training."""
    intervals: dict[str, Interval] = Field(default_factory=dict)
    """The 95% interval of a figure: of first letters over resampled test words, of probes over
    resampled tasks."""
    curve: Curve | None = None
    importance: Importance | None = None
    absorption_by_parent: list[float | None] = []
    """Absorbed fraction of each of `Results.parents`."""
    by_task: dict[str, list[float | None]] = Field(default_factory=dict)
    """Figures on each of `Results.tasks`."""
    cosine_map: str = ""
    """PNG in base64: cosines of decoder rows (down) and true features (across). One run of an entry
    has it."""
    folder: str = ""


class Spread(_Schema):
    """Mean and sample standard deviation over `n` runs; for stability, over `n` pairs of runs."""

    mean: float | None
    sd: float | None
    n: int


class Row(_Schema):
    """The summary of an entry at one L0 over its runs."""

    entry: str
    l0_target: float
    seeds: list[int]
    matched: bool
    moving: bool
    figures: dict[str, Spread]
    intervals: dict[str, Interval] = Field(default_factory=dict)
    """The ends of the runs' intervals, averaged. All runs are measured on the same words and tasks,
    so more seeds do not make these intervals shorter."""


class PairedTest(_Schema):
    """A candidate against the best baseline in one figure at one L0, paired by seed."""

    candidate: str
    l0_target: float
    figure: str
    baseline: str
    difference: float | None
    """The candidate's figure minus the baseline's, averaged over seeds."""
    better: bool | None
    """Whether the candidate is better. None: there is no difference."""
    p: float | None
    """p value of a two-sided paired t test. None: fewer than two pairs, or equal differences."""
    n: int
    """Number of pairs: seeds, or language models if there are several; for stability, pairs of
    runs."""
    off_target: list[str] = []
    """Baselines that are better than `baseline`, but missed the target L0."""


class Parent(_Schema):
    """A feature that has children."""

    feature: int
    depth: int
    """0 for a root."""
    probability: float | None
    """Share of the evaluation's samples on which it is active."""


class LetterFacts(_Schema):
    """The words and the letter probes of a language model, on which absorption is measured."""

    model_seed: int | None = None
    """Seed of the language model, if the comparison makes several."""
    metric: str
    """Whose definition of absorption it is."""
    words: int
    """Number of words."""
    test_words: int
    """Number of those of them on which SAEs are measured."""
    words_hash: str
    """Identifies the words and their split."""
    words_by_letter: list[int]
    probe_f1_by_letter: list[float | None]
    letters_above: int
    """Number of letters whose probe is good enough. With fewer than 20 none counts."""
    settings: dict[str, Any]


class Point(_Schema):
    """The point of a sweep that an entry was trained at."""

    entry: str
    """The architecture's entry in the sweep file."""
    values: dict[str, Any]
    """Values of the swept fields, such as `lr` and `sae.mask_rate`."""


class Sweep(_Schema):
    """The points of a sweep."""

    objective: str
    """The figure by which points are ranked."""
    points: dict[str, Point]
    """The point of each entry."""


class Results(_Schema):
    """The content of `results.json`."""

    schema_version: Literal[3] = SCHEMA_VERSION
    name: str
    created: str
    quick: bool = False
    versions: dict[str, str]
    machine: dict[str, str]
    config: dict[str, Any]
    """The content of the comparison file with all overrides."""
    not_ranked: list[str] = Field(default_factory=list)
    """Figures that are reported without a best value."""
    absorption_metric: str = ""
    """Whose definition the figures of absorption have."""
    first_letters: list[LetterFacts] = Field(default_factory=list)
    """One for each language model, if first letters were measured."""
    entries: dict[str, Entry]
    runs: list[Run]
    rows: list[Row]
    tests: list[PairedTest]
    parents: list[Parent] = Field(default_factory=list)
    tasks: list[str] = Field(default_factory=list)
    """The tasks of sae-probes on which SAEs were probed."""
    failed: dict[str, str] = Field(default_factory=dict)
    """The errors of the runs that failed."""
    sweep: Sweep | None = None


def results_json(results: Results) -> str:
    """Return results as JSON. Lists of numbers and the innermost objects take one line each."""
    text = to_json(results.model_dump(), compact_lists=True)
    # Safe in strings, too: JSON writes their line breaks as \\n.
    return re.sub(r"\{[^{}\[\]]*\}", lambda match: re.sub(r"\n\s*", " ", match[0]), text)


def write_results(results: Results, folder: Path) -> list[Path]:
    """Write `results.json` and `results.csv`, and return their paths."""
    json_path, csv_path = folder / "results.json", folder / "results.csv"
    return [write_text(json_path, results_json(results)), write_text(csv_path, _csv(results))]


def _csv(results: Results) -> str:
    figures = list(dict.fromkeys(name for run in results.runs for name in run.figures))
    measured = list(dict.fromkeys(name for run in results.runs for name in run.intervals))
    ends = [f"{name}_{end}" for name in measured for end in ("low", "high")]
    head = ("entry", "role", "architecture", "l0_target", "model_seed", "seed", "matched", "moving")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*head, *figures, *ends])
    for run in results.runs:
        entry = results.entries[run.entry]
        facts = [run.entry, entry.role, entry.architecture, run.l0_target, run.model_seed]
        values = [_or_none(run.figures.get(name)) for name in figures]
        values += [_or_none(end) for n in measured for end in run.intervals.get(n, (None, None))]
        table.writerow([*facts, run.seed, run.matched, run.moving, *values])
    return text.getvalue()


def _or_none(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def read_results(path: str | Path) -> Results:
    """Read a `results.json`.

    Raises:
        SettingsError: the file is missing, is not a results file, or has another schema.
    """
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # of the decoder: not JSON, or not text
        raise SettingsError(f"{path} is not JSON: {error}") from error
    if isinstance(content, dict) and cast(Any, content).get("schema_version") == 2:
        raise SettingsError(
            f"schema_version of {path} must be {SCHEMA_VERSION}, got 2: convert the file with "
            "tools/migrate_results.py of the source repository"
        )
    try:
        return Results.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join([*map(str, first["loc"]), first["msg"]])
        raise SettingsError(f"{path} is not a results.json: {reason}") from error
