"""Evaluate saved SAEs, trained here or elsewhere, on the data of a run or comparison file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import SAE

from sae_lens_atm.compare.plan.comparison_file import is_comparison, parse_comparison
from sae_lens_atm.compare.plan.planned_run import spelling_lm_folder
from sae_lens_atm.compare.plan.sweep_file import as_comparison
from sae_lens_atm.compare.run.batch_pool import batch_seed
from sae_lens_atm.compare.run.letters import letters_folder
from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.data.spelling.model import make_spelling_lm
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.first_letters import figures_of, matched_l0, scores_of
from sae_lens_atm.evaluation.language_model import (
    hold_out,
    language_model_figures,
    make_store,
)
from sae_lens_atm.evaluation.letter_store import first_letters_of
from sae_lens_atm.evaluation.letter_words import FirstLetterConfig
from sae_lens_atm.evaluation.recovered_loss import OnBatch
from sae_lens_atm.evaluation.synthetic import evaluate
from sae_lens_atm.hub.loading import load_sae
from sae_lens_atm.metrics.word_figures import Interval
from sae_lens_atm.training.preflight.checks import check_devices
from sae_lens_atm.training.run_file import Run, SyntheticRun, parse_run
from sae_lens_atm.training.synthetic_run import build_synthetic_model
from sae_lens_atm.yaml_files import apply_overrides, read_yaml


class EvaluationData(NamedTuple):
    """The data on which SAEs are evaluated, as a run, and the settings of the first letters."""

    run: Run
    first_letters: FirstLetterConfig | None = None
    folder: Path | None = None
    """Where first letters are stored. None does not store them."""


class Evaluated(NamedTuple):
    """The figures of an SAE."""

    figures: dict[str, float]
    intervals: Mapping[str, Interval] = {}
    """The 95% interval of a figure over resampled test words. First letters have it."""
    letters: dict[str, Any] | None = None
    """The words and probes, see `FirstLetters.facts`."""

    def as_json(self) -> dict[str, Any]:
        """Return the content for a file: the figures, and what is known about first letters."""
        if self.letters is None:
            return dict(self.figures)
        return {**self.figures, "intervals": self.intervals, "first_letters": self.letters}


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
    if not is_comparison(content):
        return EvaluationData(parse_run(content))
    comparison = parse_comparison(content, Path(path).stem)
    first = comparison.planned[0]
    if first.lm is not None:
        make_spelling_lm(first.lm, spelling_lm_folder(comparison.output, first.lm))
    letters = first.first_letters
    folder = None if letters is None else letters_folder(first, comparison.output)
    return EvaluationData(first.run, letters, folder)


def evaluate_saved(
    references: Sequence[str], data: EvaluationData, on_batch: OnBatch | None = None
) -> dict[str, Evaluated]:
    """Evaluate SAEs on the same samples, and return the figures of each.

    Args:
        references: folders, or `REPO:SAE_ID` on the Hub.
        data: the data.
        on_batch: is called before each batch of prompts for first letters.

    Raises:
        SettingsError: an SAE cannot be loaded, its `d_in` does not fit the data, or
            `first_letters.match_l0` is true: saved SAEs have no target L0.
    """
    run, letters = data.run, data.first_letters
    check_devices(run)
    if letters is not None:
        matched_l0(letters, None)
    saes = {reference: load_sae(reference) for reference in references}
    d_in = run.runner.sae.d_in
    for reference, sae in saes.items():
        if sae.cfg.d_in != d_in:
            raise SettingsError(f"d_in of {reference} must be {d_in}, got {sae.cfg.d_in}")
        sae.to(run.runner.device)
    if isinstance(run, SyntheticRun):
        return _evaluate_on_synthetic_data(saes, run)
    cfg = run.runner
    model = load_language_model(cfg)
    tokens = hold_out(make_store(cfg, model), cfg)
    for sae in saes.values():  # SAELens evaluates at the hook in the SAE's metadata
        sae.cfg.metadata.hook_name = cfg.hook_name
        sae.cfg.metadata.hook_head_index = cfg.hook_head_index
    figures = {n: language_model_figures(sae, model, tokens, cfg)[0] for n, sae in saes.items()}
    if letters is None:
        return {name: Evaluated(values) for name, values in figures.items()}
    found = first_letters_of(cfg, letters, lambda: model, data.folder, on_batch)
    evaluated: dict[str, Evaluated] = {}
    for name, sae in saes.items():
        scores = scores_of(sae, found)
        values = figures[name] | figures_of(scores, found)
        evaluated[name] = Evaluated(values, scores.intervals, found.facts())
    return evaluated


def _evaluate_on_synthetic_data(
    saes: dict[str, SAE[Any]], run: SyntheticRun
) -> dict[str, Evaluated]:
    model = build_synthetic_model(run)
    cfg, seed = run.runner, batch_seed(run.seed, -2)
    with torch.no_grad():
        return {
            name: Evaluated(evaluate(sae, model, cfg.eval_samples, seed, cfg.batch_size))
            for name, sae in saes.items()
        }
