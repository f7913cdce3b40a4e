"""Figures of saved SAEs on a language model, from tokens that none of them was trained on."""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_atm.compare.plan.planned_run import Planned
from sae_lens_atm.compare.run.stored_run import (
    FIGURES,
    MEASURED,
)
from sae_lens_atm.data.language_model import saved_dataset
from sae_lens_atm.evaluation.first_letters import (
    FirstLetters,
    figures_of,
    scores_of,
)
from sae_lens_atm.evaluation.synthetic import is_signed
from sae_lens_atm.files import write_json
from sae_lens_atm.training.run_file import LanguageModelRun

_FIGURES = {
    "l0": "l0",
    "explained_variance": "explained_variance",
    "mse": "mse",
    "cossim": "cosine",
    "l2_ratio": "shrinkage",
    "ce_loss_score": "ce_loss_score",
    "kl_div_score": "kl_div_score",
}
"""SAELens' names of what it evaluates, and ours."""


@dataclass
class HeldOutTokens:
    """Tokens in the place of an activation store, the same for every SAE that is evaluated."""

    batches: list[Tensor]
    context_size: int
    store_batch_size_prompts: int
    _next: int = field(default=0, repr=False)

    def get_batch_tokens(self, _batch_size: int | None = None) -> Tensor:
        self._next += 1
        return self.batches[(self._next - 1) % len(self.batches)]

    def reset_input_dataset(self) -> None:
        self._next = 0


def hold_out(store: ActivationsStore, cfg: LanguageModelSAERunnerConfig[Any]) -> HeldOutTokens:
    """The first tokens of a store's dataset, on which it then does not train in its first epoch."""
    prompts = cfg.eval_batch_size_prompts or cfg.store_batch_size_prompts
    batches = [store.get_batch_tokens(prompts) for _ in range(max(cfg.n_eval_batches, 1))]
    return HeldOutTokens(batches, cfg.context_size, prompts)


def make_store(cfg: LanguageModelSAERunnerConfig[Any], model: Any) -> ActivationsStore:
    """SAELens' store of a run's tokens and activations."""
    dataset = saved_dataset(cfg.dataset_path)
    return ActivationsStore.from_config(model, cfg, override_dataset=dataset)


@torch.no_grad()
def evaluate_on_language_model(
    planned: Planned,
    folder: Path,
    model: Any,
    tokens: HeldOutTokens,
    letters: FirstLetters | None,
) -> None:
    """Evaluate a kept SAE as its users will load it, and keep the figures."""
    home = folder / planned.folder
    cfg = cast(LanguageModelRun, planned.run).runner
    sae = SAE[Any].load_from_disk(home / "sae", device=cfg.device)
    figures, alive = language_model_figures(sae, model, tokens, cfg)
    save_file({"alive": alive}, home / MEASURED)
    found: dict[str, Any] = {
        "evaluation_key": planned.evaluation_key,
        "figures": figures,
        "signed": is_signed(sae),
    }
    if letters is not None:
        scores = scores_of(sae, letters)
        figures |= figures_of(scores, letters)
        found["absorption_by_parent"] = scores.fraction_by_letter.tolist()
        found["parent_probability"] = letters.shares.tolist()
    write_json(home / FIGURES, found)


def language_model_figures(
    sae: SAE[Any], model: Any, tokens: HeldOutTokens, cfg: LanguageModelSAERunnerConfig[Any]
) -> tuple[dict[str, float], Tensor]:
    """SAELens' own figures of a SAE, and which of its latents fired."""
    tokens.reset_input_dataset()
    with_model = len(tokens.batches)
    evals = EvalConfig(
        batch_size_prompts=tokens.store_batch_size_prompts,
        n_eval_reconstruction_batches=with_model,
        n_eval_sparsity_variance_batches=with_model,
        compute_ce_loss=True,
        compute_kl=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    excluded = cfg.exclude_special_tokens

    def run(config: EvalConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        return run_evals(
            sae,
            cast(ActivationsStore, tokens),
            model,
            ActivationScaler(),
            config,
            model_kwargs=cfg.model_kwargs,
            exclude_special_tokens=excluded,
        )

    found: tuple[dict[str, Any], dict[str, Any]] | None = None
    with suppress(ZeroDivisionError):  # where ablating the hook changes nothing in the model
        found = run(evals)
    if found is None:
        tokens.reset_input_dataset()
        found = run(replace(evals, compute_ce_loss=False, compute_kl=False))
    groups, per_latent = found
    flat = {name: value for group in groups.values() for name, value in group.items()}
    figures = {ours: float(flat[name]) for name, ours in _FIGURES.items() if name in flat}
    alive = torch.tensor(per_latent["feature_density"]) > 0
    figures["dead_latents"] = int((~alive).sum())
    return figures, alive
