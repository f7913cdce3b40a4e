"""Comparison files: which architectures to train, at which L0s, with which seeds, on which data.

A comparison file is a run file (see `training.run_file`) with `architectures` and some lists:

    runner: synthetic              # or language_model
    hierarchy_model: {...}         # everything that a run file has; shared by all SAEs
    sae: {d_in: 64, d_sae: 256}    # SAE settings shared by all SAEs
    training_samples: 3_072_000
    seeds: [0, 1, 2]
    l0: [2, 4, 8]
    architectures:
      atm: {role: candidate, sae: {schedule_steps: 3000}}
      topk: {}
      standard: {sae: {l1_coefficient: 0.1}, run: {lr: 1.0e-3}}
      masking-off: {architecture: atm, role: control, sae: {mask_rate: 0}}
      untrained: {architecture: topk, role: control, trained: false}
    spelling_lm: {seeds: [0, 1]}   # small language models to make first (see `data.spelling`)
    first_letters: {}              # measure absorption on a language model, as SAEBench defines it
    sae_probes: {tasks: 16}        # sparse probing on a language model, on tasks of sae-probes
    contrastive_stories: {}        # CE-Bench's contrastive score on a language model
    quick: {seeds: [0], training_samples: 204_800}   # changes that --quick makes
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from sae_lens_atm.baselines import training_class
from sae_lens_atm.compare.plan.comparison_settings import (
    OWN_KEYS,
    SAME_FOR_ALL,
    ComparisonSettings,
    check_settings,
)
from sae_lens_atm.compare.plan.l0_target import (
    ANY_L0,
    L0Parameter,
    direct_l0_field,
    find_l0_parameter,
    is_whole_number,
)
from sae_lens_atm.compare.plan.planned_run import EntrySettings, PlannedRun, spelling_lm_folder
from sae_lens_atm.compare.report.results import Sweep
from sae_lens_atm.data.spelling.model import HOOK, TOKENS, SpellingLMConfig
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.contrastive_stories import ContrastiveStoriesConfig
from sae_lens_atm.evaluation.letter_words import FirstLetterConfig
from sae_lens_atm.evaluation.task_store import SaeProbesConfig
from sae_lens_atm.training.found_l0 import FoundL0s, with_fields_of
from sae_lens_atm.training.run_file import SyntheticRun, parse_run
from sae_lens_atm.training.schema import parse_fields
from sae_lens_atm.yaml_files import apply_overrides, read_yaml

_Config = TypeVar("_Config")


@dataclass(frozen=True)
class Comparison:
    """A checked comparison and the plan of its runs."""

    name: str
    output: Path
    content: dict[str, Any]
    """The content of the file with all overrides."""
    quick: bool
    curve_points: int
    not_ranked: list[str]
    planned: list[PlannedRun]
    sweep: Sweep | None = None

    @property
    def is_synthetic(self) -> bool:
        """Whether the SAEs are trained on synthetic data."""
        return isinstance(self.planned[0].run, SyntheticRun)


def load_comparison(
    path: str | Path, overrides: Iterable[str] = (), quick: bool = False
) -> Comparison:
    """Read and check a comparison file, and plan its runs.

    Args:
        path: the YAML file.
        overrides: `key.subkey=value` pairs.
        quick: apply the changes under `quick`.

    Raises:
        SettingsError: the file is wrong. The message has one line for each mistake.
    """
    content = read_comparison(path, overrides, quick)
    return parse_comparison(content, Path(path).stem, quick)


def read_comparison(
    path: str | Path, overrides: Iterable[str] = (), quick: bool = False
) -> dict[str, Any]:
    """Return the content of a comparison file, after `quick` and the overrides."""
    content = read_yaml(path)
    if quick:
        quick_changes = content.get("quick")
        if not isinstance(quick_changes, dict) or not quick_changes:
            raise SettingsError(
                f"quick must be a mapping of the keys that --quick changes, got {quick_changes!r}"
            )
        changes = cast(dict[str, Any], quick_changes).items()
        content = apply_overrides(content, [f"{k}={json.dumps(v)}" for k, v in changes])
        if "output_path" in content:
            content["output_path"] = f"{content['output_path']}-quick"
    return apply_overrides(content, overrides)


def is_comparison(content: dict[str, Any]) -> bool:
    """Return whether the content of a YAML file is a comparison, not a single run."""
    return "architectures" in content


def parse_comparison(content: dict[str, Any], name: str, quick: bool = False) -> Comparison:
    """Check the content of a comparison file, and plan its runs."""
    if "sweep" in content:
        raise SettingsError("sweep: not allowed in a comparison, use `sae-lens-atm sweep`")
    if not is_comparison(content):
        raise SettingsError(
            "architectures: missing, use `sae-lens-atm train` for the run file of one SAE"
        )
    own = {key: content[key] for key in OWN_KEYS if key in content}
    asked = own.get("l0")
    if isinstance(asked, str):
        if own.get("spelling_lm") is not None:
            raise SettingsError("l0: with spelling_lm it must be a list, `found` is not possible")
        if quick:
            raise SettingsError("l0: --quick needs a list, name it under `quick`")
        own["l0"] = [ANY_L0]  # each entry has its own
    settings = check_settings({"name": name, **own})
    shared = {key: value for key, value in content.items() if key not in OWN_KEYS}
    if "seed" in shared:
        raise SettingsError("seed: not allowed in a comparison, use the list `seeds`")
    if not isinstance(shared.get("sae") or {}, dict):
        raise SettingsError(f"sae must be a mapping of fields, got {shared['sae']!r}")
    output = shared.setdefault("output_path", f"runs/{name}{'-quick' if quick else ''}")
    found = FoundL0s("l0", asked, str(output)) if isinstance(asked, str) else None
    first_letters = _on_model(FirstLetterConfig, "first_letters", settings, shared)
    sae_probes = _on_model(SaeProbesConfig, "sae_probes", settings, shared)
    stories = _on_model(ContrastiveStoriesConfig, "contrastive_stories", settings, shared)
    measured: dict[str, Any] = {
        "first_letters": first_letters,
        "sae_probes": sae_probes,
        "contrastive_stories": stories,
    }
    planned = [
        replace(plan, lm=lm, **measured)
        for lm in _spelling_lms(settings)
        for entry, entry_settings in settings.architectures.items()
        for plan in _plan_entry(entry, entry_settings, _with_model(shared, lm), settings, found)
    ]
    # Seed by seed: a comparison that is stopped has complete tables of fewer seeds.
    planned.sort(key=lambda p: (settings.seeds.index(p.seed), p.group))
    return Comparison(
        settings.name,
        Path(str(output)).expanduser(),
        content,
        quick,
        settings.curve_points,
        settings.not_ranked,
        planned,
    )


def _on_model(
    cls: type[_Config], key: str, own: ComparisonSettings, shared: dict[str, Any]
) -> _Config | None:
    """Return the settings under a key that only a comparison on a language model can have."""
    values: dict[str, Any] | None = getattr(own, key)
    if values is None:
        return None
    if own.spelling_lm is None and shared.get("runner") != "language_model":
        raise SettingsError(f"{key}: allowed only with runner: language_model")
    return parse_fields(cls, values, key)


def _spelling_lms(own: ComparisonSettings) -> list[SpellingLMConfig | None]:
    if own.spelling_lm is None:
        return [None]
    values = dict(own.spelling_lm)
    seeds: Any = values.pop("seeds", [0])
    if not isinstance(seeds, list) or not seeds or len(set(map(str, seeds))) < len(seeds):
        raise SettingsError(f"spelling_lm.seeds must be a list, each value once, got {seeds!r}")
    return [
        parse_fields(SpellingLMConfig, {**values, "seed": seed}, "spelling_lm")
        for seed in cast(list[Any], seeds)
    ]


def _with_model(shared: dict[str, Any], lm: SpellingLMConfig | None) -> dict[str, Any]:
    """Return the shared settings with a language model that the comparison makes."""
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
    if "activations" in shared:
        raise SettingsError("activations: not allowed beside spelling_lm, whose models are small")
    for key in model:
        if shared.get(key, model[key]) != model[key]:
            raise SettingsError(f"{key} cannot be set: spelling_lm sets it")
    sae: Any = shared.get("sae") or {}
    if isinstance(sae, dict) and cast(Any, sae).get("d_in", lm.d_model) != lm.d_model:
        raise SettingsError(
            f"sae.d_in must be {lm.d_model}, d_model of the language model, got {sae['d_in']}"
        )
    return {"hook_name": HOOK, **shared, **model}


def _l0s(
    name: str,
    entry: EntrySettings,
    shared: dict[str, Any],
    own: ComparisonSettings,
    found: FoundL0s | None,
    is_whole: bool,
) -> list[float]:
    """Return the L0s of one entry. An untrained one takes that of the first entry to train."""
    if found is None:
        return own.l0
    if not entry.trained:
        trained = (pair for pair in own.architectures.items() if pair[1].trained)
        name, entry = next(trained, (name, entry))
    content = with_fields_of(shared, {"sae": entry.sae})
    l0 = found.of(content, name, entry.architecture or name)
    return [max(round(l0), 1) if is_whole else float(f"{l0:.3g}")]


def _plan_entry(
    name: str,
    entry: EntrySettings,
    shared: dict[str, Any],
    own: ComparisonSettings,
    found: FoundL0s | None,
) -> Iterator[PlannedRun]:
    """Plan the runs of one entry: every L0 with every seed."""
    architecture = entry.architecture or name
    for key in entry.run:
        if key in SAME_FOR_ALL:
            raise SettingsError(
                f"architectures.{name}.run.{key} cannot differ between entries: set it at the top "
                "level"
            )
    registered = training_class(architecture)
    direct = direct_l0_field(registered[1], entry.l0_parameter) if registered else None
    sae: dict[str, Any] = {**(shared.get("sae") or {}), **entry.sae, "architecture": architecture}
    if registered is not None:
        sae = {k: v for k, v in sae.items() if k in entry.sae or _is_passed_on(registered[1], k)}
    l0_parameter: L0Parameter | None = None
    is_whole = registered is not None and is_whole_number(registered[1], direct)
    for l0 in _l0s(name, entry, shared, own, found, is_whole):
        value = int(l0) if float(l0).is_integer() else l0
        set_l0 = {direct: value} if direct and direct not in entry.sae else {}
        for seed in own.seeds:
            own_seeds = _seed_fields(registered[1], sae, seed) if registered else {}
            content = {**shared, **entry.run, "seed": seed, "sae": {**sae, **set_l0, **own_seeds}}
            try:
                run = parse_run(content)
                l0_parameter = l0_parameter or find_l0_parameter(run.runner.sae, entry.l0_parameter)
            except SettingsError as error:
                lines = str(error).splitlines()
                raise SettingsError(
                    "\n".join(f"architectures.{name}: {line}" for line in lines)
                ) from error
            samples = getattr(run.runner, "eval_samples", 1)
            if samples <= 0:
                raise SettingsError(f"eval_samples must be more than 0, got {samples}")
            plan = PlannedRun(name, entry, float(l0), seed, l0_parameter, run, own.pool_batches)
            yield replace(plan, is_found=found is not None)


def _is_passed_on(config_class: type, name: str) -> bool:
    """Return whether a shared SAE field is passed to an architecture.

    A field that only other architectures have is left out. A field that no architecture has is
    passed on, so that its spelling mistake is reported.
    """
    others = {f.name for _, other in SAE_TRAINING_CLASS_REGISTRY.values() for f in fields(other)}
    return name not in others or name in {f.name for f in fields(config_class)}


def _seed_fields(config_class: type, sae: dict[str, Any], seed: int) -> dict[str, int]:
    """Return the seed for each field `*_seed` of an architecture that the file does not set."""
    names = (f.name for f in fields(config_class) if f.name.endswith("_seed"))
    return {name: seed for name in names if name not in sae}
