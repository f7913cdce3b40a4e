"""Figures of saved SAEs on a language model, on tokens that were not used for training."""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from sae_lens_atm.data.language_model import saved_dataset
from sae_lens_atm.errors import SettingsError

# SAELens' names of the figures, and ours.
_FIGURES = {
    "l0": "l0",
    "explained_variance": "explained_variance",
    "mse": "mse",
    "cossim": "cosine",
    "l2_ratio": "shrinkage",
    "ce_loss_score": "ce_loss_score",
    "kl_div_score": "kl_div_score",
}


@dataclass
class HeldOutTokens:
    """Fixed batches of tokens with the interface of an activation store.

    Every SAE is evaluated on the same tokens.
    """

    batches: list[Tensor]
    context_size: int
    store_batch_size_prompts: int
    _next: int = field(default=0, repr=False)

    def get_batch_tokens(self, _batch_size: int | None = None) -> Tensor:
        """Return the next batch. The first follows the last."""
        self._next += 1
        return self.batches[(self._next - 1) % len(self.batches)]

    def reset_input_dataset(self) -> None:
        """Start again with the first batch."""
        self._next = 0


def hold_out(store: ActivationsStore, cfg: LanguageModelSAERunnerConfig[Any]) -> HeldOutTokens:
    """Take the first tokens of a store's dataset. It does not serve them again in this epoch."""
    prompts = cfg.eval_batch_size_prompts or cfg.store_batch_size_prompts
    batches = [store.get_batch_tokens(prompts) for _ in range(max(cfg.n_eval_batches, 1))]
    return HeldOutTokens(batches, cfg.context_size, prompts)


def make_store(cfg: LanguageModelSAERunnerConfig[Any], model: Any) -> ActivationsStore:
    """Make SAELens' store of the tokens and activations of a run.

    Raises:
        SettingsError: the dataset cannot be read.
    """
    try:
        dataset = saved_dataset(cfg.dataset_path)
        return ActivationsStore.from_config(model, cfg, override_dataset=dataset)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SettingsError(
            f"cannot read dataset_path {cfg.dataset_path!r}: {type(error).__name__}: "
            f"{' '.join(str(error).split())}"
        ) from error


def language_model_figures(
    sae: SAE[Any], model: Any, tokens: HeldOutTokens, cfg: LanguageModelSAERunnerConfig[Any]
) -> tuple[dict[str, float], Tensor]:
    """Return SAELens' figures of an SAE, and which of its latents fired, shape ``(d_sae,)``."""
    tokens.reset_input_dataset()
    number = len(tokens.batches)
    evals = EvalConfig(
        batch_size_prompts=tokens.store_batch_size_prompts,
        n_eval_reconstruction_batches=number,
        n_eval_sparsity_variance_batches=number,
        compute_ce_loss=True,
        compute_kl=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )

    def run(config: EvalConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        return run_evals(
            sae,
            cast(ActivationsStore, tokens),
            model,
            ActivationScaler(),
            config,
            model_kwargs=cfg.model_kwargs,
            exclude_special_tokens=cfg.exclude_special_tokens,
        )

    result: tuple[dict[str, Any], dict[str, Any]] | None = None
    with suppress(ZeroDivisionError):  # the model does not depend on the hook
        result = run(evals)
    if result is None:
        tokens.reset_input_dataset()
        result = run(replace(evals, compute_ce_loss=False, compute_kl=False))
    groups, per_latent = result
    flat = {name: value for group in groups.values() for name, value in group.items()}
    figures = {ours: float(flat[name]) for name, ours in _FIGURES.items() if name in flat}
    alive = torch.tensor(per_latent["feature_density"]) > 0
    figures["dead_latents"] = int((~alive).sum())
    return figures, alive
