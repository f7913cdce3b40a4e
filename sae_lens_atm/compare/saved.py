"""Figures of SAEs that were saved, here or by other people, on the data of a config."""

from collections.abc import Sequence
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_atm.compare.config import is_comparison, parse_comparison
from sae_lens_atm.compare.data import batch_seed
from sae_lens_atm.compare.language_model_runs import (
    hold_out,
    language_model_figures,
    load_language_model,
    make_store,
)
from sae_lens_atm.evaluation import evaluate
from sae_lens_atm.inspection import load_sae
from sae_lens_atm.settings import (
    Run,
    SettingsError,
    SyntheticRun,
    apply_overrides,
    parse_run,
    read_yaml,
)
from sae_lens_atm.train import build_synthetic_model, check_devices


def data_of(path: str, overrides: Sequence[str] = ()) -> Run:
    """The run whose data a config describes; of a comparison, the first."""
    content = apply_overrides(read_yaml(path), overrides)
    if is_comparison(content):
        return parse_comparison(content, "data").planned[0].run
    return parse_run(content)


def evaluate_saved(references: Sequence[str], run: Run) -> dict[str, dict[str, float]]:
    """Evaluate SAEs, each a folder or `REPO:SAE_ID`, on the same samples.

    Raises:
        SettingsError: one cannot be loaded, or does not fit the data.
    """
    check_devices(run)
    saes = {reference: load_sae(reference) for reference in references}
    d_in = run.runner.sae.d_in
    for reference, sae in saes.items():
        if sae.cfg.d_in != d_in:
            raise SettingsError(f"{reference} has d_in {sae.cfg.d_in}: allowed is {d_in}")
        sae.to(run.runner.device)
    if isinstance(run, SyntheticRun):
        return _on_synthetic_data(saes, run)
    cfg = run.runner
    model = load_language_model(cfg)
    tokens = hold_out(make_store(cfg, model), cfg)
    for sae in saes.values():  # where it is to be looked at is the config's to say
        sae.cfg.metadata.hook_name = cfg.hook_name
        sae.cfg.metadata.hook_head_index = cfg.hook_head_index
    return {name: language_model_figures(sae, model, tokens, cfg)[0] for name, sae in saes.items()}


def _on_synthetic_data(saes: dict[str, SAE[Any]], run: SyntheticRun) -> dict[str, dict[str, float]]:
    model = build_synthetic_model(run)
    cfg, seed = run.runner, batch_seed(run.seed, -2)
    with torch.no_grad():
        return {
            name: evaluate(sae, model, cfg.eval_samples, seed, cfg.batch_size)
            for name, sae in saes.items()
        }
