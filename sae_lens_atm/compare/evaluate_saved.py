"""Evaluate saved SAEs, trained here or elsewhere, on the data of a run or comparison file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import SAE

from sae_lens_atm.compare.plan.any_file import with_any_l0
from sae_lens_atm.compare.plan.comparison_file import is_comparison, parse_comparison
from sae_lens_atm.compare.plan.planned_run import spelling_lm_folder
from sae_lens_atm.compare.plan.sweep_file import as_comparison
from sae_lens_atm.compare.run.batch_pool import batch_seed
from sae_lens_atm.compare.run.reading import activations_folder
from sae_lens_atm.data.cache_writer import is_complete
from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.data.spelling.model import make_spelling_lm
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.contrastive_stories import (
    ContrastiveStoriesConfig,
    contrastive_figures,
    read_stories,
    story_activations,
)
from sae_lens_atm.evaluation.first_letters import figures_of, matched_l0, scores_of
from sae_lens_atm.evaluation.language_model import (
    flat_heads,
    hold_out,
    language_model_figures,
    make_store,
)
from sae_lens_atm.evaluation.letter_store import first_letters_of
from sae_lens_atm.evaluation.letter_words import FirstLetterConfig
from sae_lens_atm.evaluation.recovered_loss import OnBatch, ignore_batch
from sae_lens_atm.evaluation.sae_probes import Probing, probe_sae
from sae_lens_atm.evaluation.synthetic import evaluate
from sae_lens_atm.evaluation.task_store import SaeProbesConfig, TaskStore
from sae_lens_atm.hub.loading import load_sae
from sae_lens_atm.hub.same_activations import check_sae
from sae_lens_atm.metrics.word_figures import Interval
from sae_lens_atm.training.cached_run import held_out_tokens, open_cache
from sae_lens_atm.training.preflight.checks import check_dataset_exists, check_devices
from sae_lens_atm.training.preflight.lookups import check_files
from sae_lens_atm.training.run_file import Run, SyntheticRun, parse_run
from sae_lens_atm.training.synthetic_run import build_synthetic_model
from sae_lens_atm.yaml_files import apply_overrides, read_yaml


class EvaluationData(NamedTuple):
    """The data on which SAEs are evaluated, as a run, and the settings of optional figures."""

    run: Run
    first_letters: FirstLetterConfig | None = None
    sae_probes: SaeProbesConfig | None = None
    contrastive_stories: ContrastiveStoriesConfig | None = None
    folder: Path | None = None
    """Where activations for evaluations are stored. A run file has no such folder."""


class Evaluated(NamedTuple):
    """The figures of an SAE."""

    figures: dict[str, float]
    intervals: Mapping[str, Interval] = {}
    """The 95% interval of a figure, over resampled test words or tasks."""
    letters: dict[str, Any] | None = None
    """The words and probes, see `FirstLetters.facts`."""
    by_task: Mapping[str, Mapping[str, float]] = {}
    """Scores of probes, then their values on each task of sae-probes."""

    def as_json(self) -> dict[str, Any]:
        """Return the content for a file: the figures, and what is known about first letters."""
        measured = {"intervals": self.intervals, "first_letters": self.letters}
        measured |= {"by_task": self.by_task}
        return {**self.figures, **{name: value for name, value in measured.items() if value}}


def data_of(path: str, overrides: Sequence[str] = ()) -> EvaluationData:
    """Return the data of a file; for a comparison or a sweep, the data of its first run.

    A language model that the comparison makes is made first, if it is not stored.

    Args:
        path: a run, comparison or sweep file.
        overrides: `key.subkey=value` pairs.
    """
    content = apply_overrides(read_yaml(path), overrides)
    if content.pop("sweep", None) is not None and not is_comparison(content):
        content = as_comparison(content)
    content = with_any_l0(content)
    if not is_comparison(content):
        return EvaluationData(parse_run(content))
    comparison = parse_comparison(content, Path(path).stem)
    first = comparison.planned[0]
    if first.lm is not None:
        make_spelling_lm(first.lm, spelling_lm_folder(comparison.output, first.lm))
    letters, probes = first.first_letters, first.sae_probes
    stored = letters is not None or probes is not None
    folder = activations_folder(first, comparison.output) if stored else None
    return EvaluationData(first.run, letters, probes, first.contrastive_stories, folder)


def evaluate_saved(
    references: Sequence[str],
    data: EvaluationData,
    on_batch: OnBatch = ignore_batch,
    on_text: OnBatch = ignore_batch,
    on_tokens: OnBatch = ignore_batch,
) -> dict[str, Evaluated]:
    """Evaluate SAEs on the same samples, and return the figures of each.

    Args:
        references: folders, or `REPO:SAE_ID` on the Hub.
        data: the data.
        on_batch: is called before each batch of prompts for first letters.
        on_text: is called before each batch of texts of sae-probes, with numbers of characters.
        on_tokens: is called before each batch of held-out tokens, with numbers for all SAEs.

    Raises:
        SettingsError: an SAE cannot be loaded, is of other activations, or `first_letters.match_l0`
            is true: saved SAEs have no target L0.
    """
    run, letters = data.run, data.first_letters
    check_devices(run)
    if letters is not None:
        matched_l0(letters, None)
    saes = {reference: load_sae(reference) for reference in references}
    for reference, sae in saes.items():
        check_sae(reference, sae, run)
        sae.to(run.runner.device)
    if isinstance(run, SyntheticRun):
        return _evaluate_on_synthetic_data(saes, run)
    cfg = run.runner
    check_dataset_exists(cfg)
    check_files(cfg)
    store = None
    if data.sae_probes is not None and data.folder is not None:
        store = TaskStore(cfg, data.sae_probes, data.folder)
    pairs = read_stories(data.contrastive_stories)
    model = load_language_model(cfg)
    if run.activations is not None and is_complete(run.activations.folder):
        tokens = held_out_tokens(open_cache(run), run)
    else:
        tokens = hold_out(make_store(cfg, model), cfg)
    for sae in saes.values():  # SAELens evaluates at the hook in the SAE's metadata
        sae.cfg.metadata.hook_name = cfg.hook_name
        sae.cfg.metadata.hook_head_index = cfg.hook_head_index
    stories = story_activations(model, cfg, pairs)
    figures: dict[str, dict[str, float]] = {}
    for name, sae in saes.items():

        def on_batch_of_sae(done: int, every: int) -> None:
            on_tokens(len(figures) * every + done, len(saes) * every)

        figures[name] = language_model_figures(sae, model, tokens, cfg, on_batch_of_sae)[0]
        with flat_heads(sae):
            figures[name] |= contrastive_figures(sae, stories)
    evaluated = {name: Evaluated(values) for name, values in figures.items()}
    if letters is not None:
        found = first_letters_of(cfg, letters, lambda: model, data.folder, on_batch)
        for name, sae in saes.items():
            with flat_heads(sae):
                scores = scores_of(sae, found)
            values = figures[name] | figures_of(scores, found)
            evaluated[name] = Evaluated(values, scores.intervals, found.facts())
    if store is not None:
        store.fill(lambda: model, on_text)
        for name, sae in saes.items():
            with flat_heads(sae):
                evaluated[name] = _with_probes(evaluated[name], probe_sae(sae, store))
    return evaluated


def _with_probes(evaluated: Evaluated, probing: Probing) -> Evaluated:
    return evaluated._replace(
        figures=evaluated.figures | probing.figures,
        intervals={**evaluated.intervals, **probing.intervals},
        by_task={
            name: dict(zip(probing.tasks, values, strict=True))
            for name, values in probing.by_task.items()
        },
    )


def _evaluate_on_synthetic_data(
    saes: dict[str, SAE[Any]], run: SyntheticRun
) -> dict[str, Evaluated]:
    model = build_synthetic_model(run)
    cfg, seed = run.runner, batch_seed(run.seed, -2)
    if cfg.eval_samples < 1:
        raise SettingsError(f"eval_samples must be more than 0, got {cfg.eval_samples}")
    with torch.no_grad():
        return {
            name: Evaluated(evaluate(sae, model, cfg.eval_samples, seed, cfg.batch_size))
            for name, sae in saes.items()
        }
