"""Evaluate saved SAEs, trained here or elsewhere, on the data of a run or comparison file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import SAE

from sae_lens_atm.compare.plan.comparison_file import is_comparison, parse_comparison
from sae_lens_atm.compare.plan.planned_run import spelling_lm_folder
from sae_lens_atm.compare.plan.sweep_file import as_comparison
from sae_lens_atm.compare.run.batch_pool import batch_seed
from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.data.spelling.model import make_spelling_lm
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.first_letters import (
    FirstLetterConfig,
    figures_of,
    look_at_first_letters,
    scores_of,
)
from sae_lens_atm.evaluation.language_model import (
    hold_out,
    language_model_figures,
    make_store,
)
from sae_lens_atm.evaluation.synthetic import evaluate
from sae_lens_atm.hub.loading import load_sae
from sae_lens_atm.training.preflight.checks import check_devices
from sae_lens_atm.training.run_file import Run, SyntheticRun, parse_run
from sae_lens_atm.training.synthetic_run import build_synthetic_model
from sae_lens_atm.yaml_files import apply_overrides, read_yaml


class EvaluationData(NamedTuple):
    """The data on which SAEs are evaluated, as a run, and the settings of the first letters."""

    run: Run
    first_letters: FirstLetterConfig | None = None


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
    return EvaluationData(first.run, first.first_letters)


def evaluate_saved(references: Sequence[str], data: EvaluationData) -> dict[str, dict[str, float]]:
    """Evaluate SAEs on the same samples, and return the figures of each.

    Args:
        references: folders, or `REPO:SAE_ID` on the Hub.
        data: the data.

    Raises:
        SettingsError: an SAE cannot be loaded, or its `d_in` does not fit the data.
    """
    run = data.run
    check_devices(run)
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
    if data.first_letters is not None:
        letters = look_at_first_letters(model, cfg.hook_name, data.first_letters, cfg.model_kwargs)
        for name, sae in saes.items():
            figures[name] |= figures_of(scores_of(sae, letters), letters)
    return figures


def _evaluate_on_synthetic_data(
    saes: dict[str, SAE[Any]], run: SyntheticRun
) -> dict[str, dict[str, float]]:
    model = build_synthetic_model(run)
    cfg, seed = run.runner, batch_seed(run.seed, -2)
    with torch.no_grad():
        return {
            name: evaluate(sae, model, cfg.eval_samples, seed, cfg.batch_size)
            for name, sae in saes.items()
        }
