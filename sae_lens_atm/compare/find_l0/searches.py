"""The searches of a run file or comparison file: one for each architecture."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sae_lens.synthetic import SyntheticSAERunnerConfig

from sae_lens_atm.compare.find_l0.search import Limits
from sae_lens_atm.compare.plan.comparison_file import (
    Comparison,
    is_comparison,
    parse_comparison,
    read_comparison,
)
from sae_lens_atm.compare.plan.l0_target import (
    ANY_L0,
    FINDS_L0,
    SMALLEST_K,
    direct_l0_field,
    is_whole_number,
)
from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.compare.plan.sweep_file import as_comparison
from sae_lens_atm.compare.run.cached import longest_run
from sae_lens_atm.data.cache_writer import plan_cache
from sae_lens_atm.errors import SettingsError, shown
from sae_lens_atm.training.found_l0 import key_of, search_folder, with_fields_of
from sae_lens_atm.training.run_file import LanguageModelRun

SEEDS = (0, 1, 2)
_SAMPLES = ("training_samples", "training_tokens")
_STEPS = ("lr_warm_up_steps", "lr_decay_steps", "schedule_steps")
_NOT_NEEDED = ("first_letters", "sae_probes", "contrastive_stories", "not_ranked", "quick")
_EVALUATED = 10_000  # samples of a synthetic model: figures that the search does not use

Values = dict[str, Any]


@dataclass(frozen=True)
class Search:
    """The search of one entry."""

    entry: str
    content: Values
    """The content of a comparison file that has this entry alone."""
    seeds: list[int]
    limits: Limits

    @property
    def architecture(self) -> str:
        """Name in SAELens' registry."""
        entry = self.content["architectures"][self.entry]
        return str(entry.get("architecture") or self.entry)

    def comparison(self, length: float, l0s: Sequence[float], seeds: Sequence[int]) -> Comparison:
        """Return the comparison that trains at these L0s, with these seeds.

        Args:
            length: the length of training, in units of the file's.
            l0s: the L0s.
            seeds: the seeds.
        """
        content = scaled(self.content, length) | {"l0": list(l0s), "seeds": list(seeds)}
        return parse_comparison(content, self.entry)


@dataclass(frozen=True)
class Searches:
    """The searches of a file."""

    name: str
    output: Path
    searches: list[Search]


def load_searches(
    path: str | Path,
    overrides: Iterable[str] = (),
    seeds: Sequence[int] = SEEDS,
    l0: tuple[float, float] | None = None,
    longest: float = 2.0,
) -> Searches:
    """Read a run file or a comparison file, and plan a search for each architecture to train.

    Args:
        path: the YAML file.
        overrides: `key.subkey=value` pairs.
        seeds: seeds of the SAEs.
        l0: smallest and largest L0 to try. By default from `d_sae / 1024`, at least 1, to a quarter
            of the smaller of `d_in` and `d_sae`.
        longest: longest training, in units of the file's.

    Raises:
        SettingsError: the file is wrong, or the range is.
    """
    content = read_comparison(path, overrides)
    if "sweep" in content:
        raise SettingsError("sweep: find-l0 takes a run file or a comparison file")
    content.setdefault("output_path", f"runs/{Path(path).stem}")
    output = search_folder(content["output_path"])
    if not is_comparison(content):
        sae = content.get("sae")
        if isinstance(sae, dict) and isinstance(cast(Values, sae).get("k"), str):
            content["sae"] = {k: v for k, v in cast(Values, sae).items() if k != "k"}
        content = as_comparison(content)
    content = {k: v for k, v in content.items() if k not in _NOT_NEEDED}
    content |= {"output_path": str(output), "seeds": list(seeds), "l0": [ANY_L0]}
    content["curve_points"] = 10
    if content.get("spelling_lm") is not None:
        raise SettingsError("spelling_lm: find-l0 takes one language model, use `make-lm` first")
    name = str(content.get("name", Path(path).stem))
    planned = parse_comparison(content, name).planned  # the mistakes of the file, before anything
    content = _with_size_of_cache(content, planned)
    saes = {p.entry: p for p in planned if p.settings.trained}
    if not saes:
        raise SettingsError("architectures: find-l0 needs an entry that is trained")
    searches = [
        Search(entry, _of_entry(content, plan), list(seeds), _limits(plan, l0, longest))
        for entry, plan in saes.items()
    ]
    return Searches(name, output, searches)


def _of_entry(content: Values, planned: PlannedRun) -> Values:
    """Return the content of a file that has this entry alone, and the length of its training.

    `scaled` changes the length only if it stands at the top of the file.
    """
    runner, entry = planned.run.runner, content["architectures"][planned.entry]
    field = next(name for name in _SAMPLES if hasattr(runner, name))
    result = content | {field: getattr(runner, field)}
    if isinstance(runner, SyntheticSAERunnerConfig):
        result["eval_samples"] = min(runner.eval_samples, _EVALUATED)
    if isinstance(entry, dict) and isinstance(cast(Values, entry).get("run"), dict):
        own = {k: v for k, v in cast(Values, entry)["run"].items() if k != field}
        entry = cast(Values, entry) | {"run": own}
    return result | {"architectures": {planned.entry: entry}}


def _with_size_of_cache(content: Values, planned: Sequence[PlannedRun]) -> Values:
    """Return the content with the number of tokens to cache.

    The first round writes the cache. By default it would have the tokens of that round.
    """
    run = planned[0].run
    if not isinstance(run, LanguageModelRun) or run.activations is None:
        return content
    contexts = plan_cache(longest_run(planned).runner, run.activations).contexts
    tokens = contexts * run.runner.context_size
    return content | {"activations": content["activations"] | {"tokens": tokens}}


def _limits(planned: PlannedRun, l0: tuple[float, float] | None, longest: float) -> Limits:
    sae = planned.run.runner.sae
    if sae.reshape_activations != "none":
        raise SettingsError(
            f"sae.reshape_activations is {shown(sae.reshape_activations)}: find-l0 needs 'none'"
        )
    if getattr(sae, FINDS_L0, False) and planned.settings.l0_parameter is None:
        raise SettingsError(
            f"architectures.{planned.entry}: its L0 follows from its method, so find-l0 cannot "
            "train it at others: leave it out"
        )
    if not 1 <= longest < math.inf:
        raise SettingsError(f"--longest must be a number, 1 or more, got {longest:g}")
    whole = is_whole_number(type(sae), direct_l0_field(type(sae), planned.settings.l0_parameter))
    low, high = l0 or _default_range(sae.d_in, sae.d_sae)
    if not 1 <= low < high <= sae.d_sae:
        raise SettingsError(
            f"--l0 must be LOW,HIGH with 1 <= LOW < HIGH <= d_sae ({sae.d_sae}), got "
            f"{low:g},{high:g}"
        )
    smallest = max(_rounded(low, math.ceil, whole), float(getattr(sae, SMALLEST_K, 1)))
    largest = _rounded(high, math.floor, whole)
    if not smallest < largest:
        raise SettingsError(f"--l0: LOW and HIGH are too close, got {low:g},{high:g}")
    return Limits(smallest, largest, whole, longest)


def _rounded(l0: float, direction: Callable[[float], int], whole: bool) -> float:
    """Round to three digits, or to a whole number, as the L0s between the limits are."""
    if whole:
        return float(direction(l0))
    scale = 10.0 ** (2 - math.floor(math.log10(l0)))
    return float(f"{direction(round(l0 * scale, 6)) / scale:.3g}")


def _default_range(d_in: int, d_sae: int) -> tuple[float, float]:
    low = max(d_sae // 1024, 1)
    return low, max(min(d_in, d_sae) / 4, 2 * low)


def scaled(content: Mapping[str, Any], length: float) -> Values:
    """Return the content of a comparison file for a training of another length.

    The numbers of steps of warm-up and decay are changed in proportion.

    Args:
        content: the content.
        length: in units of the content's own.
    """

    def steps(values: Mapping[str, Any]) -> Values:
        return {
            key: round(value * length)
            if (key in _STEPS or key.endswith("_warm_up_steps")) and isinstance(value, int)
            else value
            for key, value in values.items()
        }

    result = steps(content)
    for key in _SAMPLES:
        if key in result:
            result[key] = max(round(result[key] * length), 1)
    result["sae"] = steps(result.get("sae") or {})
    entries: dict[str, Values] = result["architectures"]
    result["architectures"] = {
        name: entry
        | {key: steps(entry[key]) for key in ("sae", "run") if isinstance(entry.get(key), dict)}
        for name, entry in entries.items()
    }
    return result


def search_key(one: Search) -> str:
    """Return the hash of what the answer of a search depends on."""
    entry = one.content["architectures"][one.entry]
    return key_of(with_fields_of(one.content, entry), one.architecture)
