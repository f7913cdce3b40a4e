"""The searches of a run file or comparison file: one for each architecture.

A search trains SAEs as a comparison does: each is stored, and none is trained twice. The same call
therefore resumes a search that was stopped.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from sae_lens_atm.compare.find_l0.search import FoundL0, Limits, search
from sae_lens_atm.compare.plan.comparison_file import (
    Comparison,
    is_comparison,
    parse_comparison,
    read_comparison,
)
from sae_lens_atm.compare.plan.l0_target import direct_l0_field, is_whole_number
from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.compare.plan.sweep_file import as_comparison
from sae_lens_atm.compare.report.results import Curve
from sae_lens_atm.compare.run.cached import longest_run
from sae_lens_atm.compare.run.checks import check
from sae_lens_atm.compare.run.comparison import run_lists
from sae_lens_atm.compare.run.processes import Job, JobEvents, run_jobs
from sae_lens_atm.compare.run.stored_run import TRAINING
from sae_lens_atm.compare.run.tasks import make_jobs
from sae_lens_atm.data.cache_writer import plan_cache
from sae_lens_atm.errors import SettingsError, shown
from sae_lens_atm.files import locked, read_json, write_json
from sae_lens_atm.training.found_l0 import FILENAME, SCHEMA, key_of, search_folder, with_fields_of
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.preflight.checks import check_devices
from sae_lens_atm.training.run_file import LanguageModelRun

SEEDS = (0, 1, 2)
_SAMPLES = ("training_samples", "training_tokens")
_STEPS = ("lr_warm_up_steps", "lr_decay_steps", "schedule_steps")
_NOT_NEEDED = ("first_letters", "sae_probes", "contrastive_stories", "not_ranked", "quick")
_EVALUATED = 10_000  # samples of a synthetic model: figures that the search does not use

Values = dict[str, Any]
OnRound = Callable[[str, Sequence[Job]], AbstractContextManager[JobEvents]]
"""Is called with the name of a round and its jobs, and shows their progress."""


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
    content |= {"output_path": str(output), "seeds": list(seeds), "l0": [1], "curve_points": 10}
    if "eval_samples" in content or content.get("runner") == "synthetic":
        content["eval_samples"] = min(content.get("eval_samples", _EVALUATED), _EVALUATED)
    if content.get("spelling_lm") is not None:
        raise SettingsError("spelling_lm: find-l0 takes one language model, use `make-lm` first")
    name = str(content.get("name", Path(path).stem))
    planned = parse_comparison(content, name).planned  # the mistakes of the file, before anything
    content = _with_size_of_cache(content, planned)
    saes = {p.entry: p for p in planned if p.settings.trained}
    searches = [
        Search(
            entry,
            content | {"architectures": {entry: content["architectures"][entry]}},
            list(seeds),
            _limits(plan, l0, longest),
        )
        for entry, plan in saes.items()
    ]
    return Searches(name, output, searches)


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
    low, high = l0 or _default_range(sae.d_in, sae.d_sae)
    if not 1 <= low < high <= sae.d_sae:
        raise SettingsError(
            f"--l0 must be LOW,HIGH with 1 <= LOW < HIGH <= d_sae ({sae.d_sae}), got "
            f"{low:g},{high:g}"
        )
    if longest < 1:
        raise SettingsError(f"--longest must be 1 or more, got {longest:g}")
    field = direct_l0_field(type(sae), planned.settings.l0_parameter)
    whole = is_whole_number(type(sae), field)
    return Limits(float(low), float(high), whole, longest)


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


def find_l0(
    searches: Searches,
    at_once: int,
    on_round: OnRound,
    stop: StopFlag | None = None,
    threads: int | None = None,
) -> dict[str, FoundL0]:
    """Carry out searches, and return the answer for each entry.

    The answers are written to `found_l0.json` in the output folder as they come.

    Args:
        searches: the searches.
        at_once: maximum number of processes.
        on_round: shows the progress.
        stop: flag to stop between training steps.
        threads: number of threads of each process; None divides the cores among the processes.

    Raises:
        Interrupted: a signal or `stop` stopped the search. The same call resumes it.
        SettingsError: a setting is wrong, or a run failed.
    """
    stop = stop or StopFlag()
    found: dict[str, FoundL0] = {}
    with stop.on_signals(), locked(searches.output):
        for one in searches.searches:

            def measure(
                length: float, l0s: Sequence[float], seeds: Sequence[int], one: Search = one
            ) -> dict[tuple[float, int], float]:
                comparison = one.comparison(length, l0s, seeds)
                show = partial(on_round, f"{one.entry}, {length:g} of the training")
                _train(comparison, at_once, show, stop, threads)
                return {
                    (p.l0, p.seed): _saved_bits(p, comparison.output) for p in comparison.planned
                }

            found[one.entry] = search(measure, one.seeds, one.limits)
            _write(searches, found)
        shutil.rmtree(searches.output / "pools", ignore_errors=True)
    return found


def _train(
    comparison: Comparison,
    at_once: int,
    show: Callable[[Sequence[Job]], AbstractContextManager[JobEvents]],
    stop: StopFlag,
    threads: int | None,
) -> None:
    check(comparison)
    for planned in comparison.planned:
        check_devices(planned.run)
    lists = make_jobs(comparison, evaluate=False)
    with show([job for jobs in lists for job in jobs]) as events:
        failed = run_lists(lists, lambda jobs: run_jobs(jobs, at_once, events, stop, threads))
    if failed:
        raise SettingsError("\n".join(f"{label}: {error}" for label, error in failed.items()))


def _saved_bits(planned: PlannedRun, folder: Path) -> float:
    facts = read_json(folder / planned.folder / TRAINING)
    saved = Curve.model_validate(facts["curve"]).saved_bits
    if not saved or saved[-1] is None:
        raise SettingsError(
            f"{folder / planned.folder} has no saved bits: an older version trained this SAE. "
            f"Delete {folder} and search again"
        )
    return saved[-1]


def search_key(one: Search) -> str:
    """Return the hash of what the answer of a search depends on."""
    entry = one.content["architectures"][one.entry]
    return key_of(with_fields_of(one.content, entry), one.architecture)


def _write(searches: Searches, found: Mapping[str, FoundL0]) -> None:
    registered = {one.entry: one for one in searches.searches if one.entry in found}
    keys = {name: search_key(one) for name, one in registered.items()}
    write_json(
        searches.output / FILENAME,
        {
            "schema": SCHEMA,
            "name": searches.name,
            "keys": keys,
            "entries": {name: answer.model_dump() for name, answer in found.items()},
        },
    )
