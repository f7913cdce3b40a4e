"""Comparison files: which architectures, at which L0s, with which seeds, on what.

A comparison file is a run file (see `settings`) with `architectures` added, and lists where a run
has one value:

    runner: synthetic              # or language_model
    hierarchy_model: {...}         # everything a run file has, shared by all
    sae: {d_in: 64, d_sae: 256}    # what all SAEs share
    training_samples: 3_072_000
    seeds: [0, 1, 2]
    l0: [2, 4, 8]
    architectures:
      atm: {role: candidate, sae: {schedule_steps: 3000}}
      topk: {}
      standard: {sae: {l1_coefficient: 0.1}, run: {lr: 1.0e-3}}
      masking-off: {architecture: atm, role: control, sae: {mask_rate: 0}}
      untrained: {architecture: topk, role: control, trained: false}
    spelling_lm: {seeds: [0, 1]}   # language models that are made here (see `spelling`)
    first_letters: {}              # absorption on a language model, by SAEBench's definition
    quick: {seeds: [0], training_samples: 204_800}   # what --quick changes
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_atm.compare.plan.l0_target import Knob, direct_knob, find_knob
from sae_lens_atm.compare.plan.planned_run import EntrySettings, Planned, spelling_lm_folder
from sae_lens_atm.compare.report.results import Sweep
from sae_lens_atm.data.spelling.model import HOOK, TOKENS, SpellingLMConfig
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.first_letters import FirstLetterConfig
from sae_lens_atm.metrics.figures import FIGURES
from sae_lens_atm.training.run_file import SyntheticRun, apply_overrides, parse_run, read_yaml
from sae_lens_atm.training.schema import describe_errors, parse_fields

OWN_KEYS = (
    "name",
    "seeds",
    "l0",
    "architectures",
    "quick",
    "curve_points",
    "pool_batches",
    "not_ranked",
    "spelling_lm",
    "first_letters",
)
SAME_FOR_ALL = (
    "runner",
    "sae",
    "seed",
    "output_path",
    "checkpoint_path",
    "logger",
    "hierarchy_model",
    "synthetic_model",
    "model_name",
    "model_class_name",
    "dataset_path",
    "is_dataset_tokenized",
    "streaming",
    "hook_name",
    "hook_head_index",
    "context_size",
    "seqpos_slice",
    "prepend_bos",
    "exclude_special_tokens",
    "model_kwargs",
    "model_from_pretrained_kwargs",
    "store_batch_size_prompts",
    "eval_batch_size_prompts",
    "n_eval_batches",
    "eval_samples",
    "eval_frequency",
    "n_checkpoints",
    "max_bad_batches",
    "device",
    "llm_device",
    "act_store_device",
)
"""In which the runs of a comparison cannot differ: the data, how they are judged, and where."""


class _OwnSettings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    l0: list[PositiveFloat] = Field(min_length=1)
    architectures: dict[str, EntrySettings] = Field(min_length=1)
    quick: dict[str, Any] = Field(default_factory=dict)
    curve_points: int = Field(default=20, ge=2)
    """How often a run is looked at along the way."""
    not_ranked: list[str] = Field(default_factory=list)
    """Figures to report without calling any the best, where they mean little."""
    pool_batches: int | None = Field(default=None, ge=1)
    """On synthetic data: how many batches to draw for a seed, gone through again and again; all
    of them if left out."""
    spelling_lm: dict[str, Any] | None = None
    """Fields of `SpellingLMConfig`, with `seeds` in the place of its seed: every SAE is trained on
    each of these models."""
    first_letters: dict[str, Any] | None = None
    """Fields of `FirstLetterConfig`; left out, absorption is not looked for."""


@dataclass(frozen=True)
class Comparison:
    """A comparison, checked to the last key."""

    name: str
    output: Path
    content: dict[str, Any]
    """The file, overrides applied."""
    quick: bool
    curve_points: int
    not_ranked: list[str]
    planned: list[Planned]
    sweep: Sweep | None = None

    @property
    def is_synthetic(self) -> bool:
        return isinstance(self.planned[0].run, SyntheticRun)


def load_comparison(
    path: str | Path, overrides: Iterable[str] = (), quick: bool = False
) -> Comparison:
    """Read a comparison file, check everything, and lay out its runs.

    Raises:
        SettingsError: with one line for each thing that is wrong.
    """
    content = read_comparison(path, overrides, quick)
    return parse_comparison(content, Path(path).stem, quick)


def read_comparison(
    path: str | Path, overrides: Iterable[str] = (), quick: bool = False
) -> dict[str, Any]:
    """The content of a comparison file, shortened and changed."""
    content = read_yaml(path)
    if quick:
        shorter = content.get("quick")
        if not isinstance(shorter, dict) or not shorter:
            raise SettingsError(f"quick is {shorter!r}: allowed is a mapping that shortens it")
        changes = cast(dict[str, Any], shorter).items()
        content = apply_overrides(content, [f"{k}={json.dumps(v)}" for k, v in changes])
        if "output_path" in content:
            content["output_path"] = f"{content['output_path']}-quick"
    return apply_overrides(content, overrides)


def is_comparison(content: dict[str, Any]) -> bool:
    """Whether the content of a YAML file is a comparison, not a single run."""
    return "architectures" in content


def parse_comparison(content: dict[str, Any], name: str, quick: bool = False) -> Comparison:
    """Check the content of a comparison file."""
    if "sweep" in content:
        raise SettingsError("sweep: this is for `sae-lens-atm sweep`")
    if not is_comparison(content):
        raise SettingsError(
            "architectures: missing, this is a single run, for `sae-lens-atm train`"
        )
    own = {key: content[key] for key in OWN_KEYS if key in content}
    try:
        settings = _OwnSettings.model_validate({"name": name, **own})
    except ValidationError as error:
        raise SettingsError("\n".join(describe_errors(error, own, _OwnSettings))) from error
    for what, values in (("seeds", settings.seeds), ("l0", settings.l0)):
        if len(set(values)) != len(values):
            raise SettingsError(f"{what} is {values!r}: allowed is each value once")
    for figure in settings.not_ranked:
        if figure not in FIGURES:
            raise SettingsError(
                f"not_ranked has {figure!r}: allowed are figures, {', '.join(FIGURES)}"
            )
    shared = {key: value for key, value in content.items() if key not in OWN_KEYS}
    if "seed" in shared:
        raise SettingsError("seed: a comparison has seeds, a list")
    if not isinstance(shared.get("sae") or {}, dict):
        raise SettingsError(f"sae is {shared['sae']!r}: allowed is a mapping of fields")
    output = shared.setdefault("output_path", f"runs/{name}{'-quick' if quick else ''}")
    letters = _first_letters(settings, shared)
    planned = [
        replace(plan, lm=lm, first_letters=letters)
        for lm in _spelling_lms(settings)
        for entry, entry_settings in settings.architectures.items()
        for plan in _plan_entry(entry, entry_settings, _on_model(shared, lm), settings)
    ]
    # Seed by seed, so that a comparison stopped half-way holds whole tables of fewer seeds.
    planned.sort(key=lambda p: (settings.seeds.index(p.seed), p.group))
    output_folder = Path(str(output)).expanduser()
    return Comparison(
        settings.name,
        output_folder,
        content,
        quick,
        settings.curve_points,
        settings.not_ranked,
        planned,
    )


def _first_letters(own: _OwnSettings, shared: dict[str, Any]) -> FirstLetterConfig | None:
    if own.first_letters is None:
        return None
    if own.spelling_lm is None and shared.get("runner") != "language_model":
        raise SettingsError("first_letters: only with runner: language_model")
    return parse_fields(FirstLetterConfig, own.first_letters, "first_letters")


def _spelling_lms(own: _OwnSettings) -> list[SpellingLMConfig | None]:
    if own.spelling_lm is None:
        return [None]
    values = dict(own.spelling_lm)
    seeds = values.pop("seeds", [0])
    if (
        not isinstance(seeds, list)
        or not seeds
        or len(set(map(str, cast(Any, seeds)))) < len(cast(list[Any], seeds))
    ):
        raise SettingsError(f"spelling_lm.seeds is {seeds!r}: allowed is a list, each value once")
    return [
        parse_fields(SpellingLMConfig, {**values, "seed": seed}, "spelling_lm")
        for seed in cast(list[Any], seeds)
    ]


def _on_model(shared: dict[str, Any], lm: SpellingLMConfig | None) -> dict[str, Any]:
    """What all SAEs on a language model share, that model among it."""
    if lm is None:
        return shared
    folder = spelling_lm_folder(Path(str(shared["output_path"])).expanduser(), lm)
    model = {
        "runner": "language_model",
        "model_name": str(folder),
        "model_class_name": "AutoModelForCausalLM",
        "dataset_path": str(folder / TOKENS),
        "is_dataset_tokenized": True,
        "streaming": False,
        "context_size": lm.context_size,
    }
    twice = [key for key in model if shared.get(key, model[key]) != model[key]]
    if twice:
        raise SettingsError(f"{twice[0]}: spelling_lm says that already")
    sae: Any = shared.get("sae") or {}
    if isinstance(sae, dict) and cast(Any, sae).get("d_in", lm.d_model) != lm.d_model:
        raise SettingsError(
            f"sae.d_in is {sae['d_in']}: allowed is {lm.d_model}, the model's width"
        )
    return {"hook_name": HOOK, **shared, **model}


def _plan_entry(
    name: str, entry: EntrySettings, shared: dict[str, Any], own: _OwnSettings
) -> Iterator[Planned]:
    architecture = entry.architecture or name
    same = [key for key in entry.run if key in SAME_FOR_ALL]
    if same:
        raise SettingsError(f"architectures.{name}.run.{same[0]}: the same for all in a comparison")
    registered = SAE_TRAINING_CLASS_REGISTRY.get(architecture)
    direct = direct_knob(registered[1], entry.l0_knob) if registered else None
    sae: dict[str, Any] = {**(shared.get("sae") or {}), **entry.sae, "architecture": architecture}
    if registered is not None:
        sae = {k: v for k, v in sae.items() if k in entry.sae or _has_field(registered[1], k)}
    knob: Knob | None = None
    for l0 in own.l0:
        value = int(l0) if float(l0).is_integer() else l0
        set_l0 = {direct: value} if direct and direct not in entry.sae else {}
        for seed in own.seeds:
            own_seeds = _seeds_of(registered[1], sae, seed) if registered else {}
            content = {**shared, **entry.run, "seed": seed, "sae": {**sae, **set_l0, **own_seeds}}
            try:
                run = parse_run(content)
                knob = knob or find_knob(run.runner.sae, entry.l0_knob)
            except SettingsError as error:
                lines = str(error).splitlines()
                raise SettingsError(
                    "\n".join(f"architectures.{name}: {line}" for line in lines)
                ) from error
            samples = getattr(run.runner, "eval_samples", 1)
            if samples <= 0:
                raise SettingsError(f"eval_samples is {samples}: allowed is more than 0")
            yield Planned(name, entry, float(l0), seed, knob, run, own.pool_batches)


def _has_field(config_class: type, name: str) -> bool:
    # A misspelt field of `sae`, shared by all, must still be found: only real fields of some
    # registered architecture are dropped for those that lack them.
    known = {f.name for _, other in SAE_TRAINING_CLASS_REGISTRY.values() for f in fields(other)}
    return name not in known or name in {f.name for f in fields(config_class)}


def _seeds_of(config_class: type, given: dict[str, Any], seed: int) -> dict[str, int]:
    """Whatever else an architecture draws by a seed of its own differs from seed to seed too."""
    names = (f.name for f in fields(config_class) if f.name.endswith("_seed"))
    return {name: seed for name in names if name not in given}
