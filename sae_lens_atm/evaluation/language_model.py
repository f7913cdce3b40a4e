"""Figures of saved SAEs on a language model, on tokens that were not used for training."""

import warnings
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig
from sae_lens.evals import EvalConfig, get_sparsity_and_variance_metrics, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids
from torch import Tensor

from sae_lens_atm.data.language_model import saved_dataset
from sae_lens_atm.errors import SettingsError, with_type
from sae_lens_atm.evaluation.model_from_hook import model_from_hook
from sae_lens_atm.evaluation.next_token_loss import TOKENS
from sae_lens_atm.evaluation.recovered_loss import HookPoint, OnBatch, SharedPasses, ignore_batch
from sae_lens_atm.evaluation.synthetic import decoder_figures
from sae_lens_atm.metrics.hierarchy import FEWEST_SAMPLES, HierarchyScore

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
    shared: dict[Any, SharedPasses | None] = field(default_factory=dict[Any, Any], repr=False)
    """Passes of the model that all SAEs at a hook share; None if they are not exact."""
    stored_inputs: Iterable[Tensor] = ()
    """Activations of other tokens, shape ``(samples, d_in)``. Dead latents fire on none of them
    either. The tokens alone are few, so latents that fire rarely would count as dead."""
    _next: int = field(default=0, repr=False)

    @classmethod
    def from_rows(cls, rows: Tensor) -> "HeldOutTokens":
        """Divide prompts, shape ``(prompts, context)``, into batches of `TOKENS` tokens."""
        context = rows.shape[1]
        size = max(TOKENS // context, 1)
        return cls(list(rows.split(size)), context, size)

    def get_batch_tokens(self, _batch_size: int | None = None) -> Tensor:
        """Return the next batch. The first follows the last."""
        self._next += 1
        return self.batches[(self._next - 1) % len(self.batches)]

    def reset_input_dataset(self) -> None:
        """Start again with the first batch."""
        self._next = 0


def hold_out(store: ActivationsStore, cfg: LanguageModelSAERunnerConfig[Any]) -> HeldOutTokens:
    """Take the next tokens of a store's dataset. It does not serve them again in this epoch.

    Their number is that of SAELens' evaluation.
    """
    prompts = cfg.eval_batch_size_prompts or cfg.store_batch_size_prompts
    return HeldOutTokens.from_rows(store.get_batch_tokens(prompts * max(cfg.n_eval_batches, 1)))


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
            f"cannot read dataset_path {cfg.dataset_path!r}: {with_type(error)}"
        ) from error


def language_model_figures(
    sae: SAE[Any],
    model: Any,
    tokens: HeldOutTokens,
    cfg: LanguageModelSAERunnerConfig[Any],
    on_batch: OnBatch = ignore_batch,
) -> tuple[dict[str, float], Tensor]:
    """Return SAELens' figures of an SAE, and which latents fire on the tokens, shape ``(d_sae,)``.

    The model runs once for each SAE, from the hook on. The passes without an SAE are made once and
    kept in `tokens`. Models for which this is not exact are evaluated by SAELens' `run_evals`.

    Args:
        sae: the SAE, with its hook in its metadata.
        model: the language model.
        tokens: held-out tokens of this model.
        cfg: the settings of the run.
        on_batch: is called before each batch.
    """
    metadata = sae.cfg.metadata
    hook = HookPoint(str(metadata.hook_name), metadata.hook_head_index)
    shared = _shared_passes(model, tokens, hook, cfg)
    tokens.reset_input_dataset()
    hierarchy: dict[str, float] = {}
    if shared is None:
        found, density = _figures_of_saelens(sae, model, tokens, cfg)
    else:
        with flat_heads(sae):
            found = shared.scores(sae, on_batch)
            metrics, density = get_sparsity_and_variance_metrics(
                sae,
                cast(Any, shared),
                cast(ActivationsStore, tokens),
                ActivationScaler(),
                n_batches=len(tokens.batches),
                compute_l2_norms=True,
                compute_sparsity_metrics=True,
                compute_variance_metrics=True,
                compute_featurewise_density_statistics=True,
                eval_batch_size_prompts=tokens.store_batch_size_prompts,
                model_kwargs={},
                ignore_tokens=_excluded(cfg, model),
            )
            hierarchy = _hierarchy_figure(sae, shared)
        found |= metrics
    figures = {ours: float(found[name]) for name, ours in _FIGURES.items() if name in found}
    alive = torch.tensor(density["feature_density"]) > 0
    excluded = torch.tensor(_excluded(cfg, model), dtype=torch.long)
    counted = (~torch.isin(batch.cpu(), excluded) for batch in tokens.batches)
    evaluated = sum(int(batch.sum()) for batch in counted)
    with flat_heads(sae):
        fired, further = fired_on(sae, _watched(tokens, on_batch))
    figures["dead_latents"] = int((~(alive | fired.cpu())).sum())
    figures["evaluated_samples"] = evaluated
    figures["dead_window"] = evaluated + further
    figures |= decoder_figures(sae, alive, None if shared is None else shared.inputs())
    figures |= hierarchy
    return figures, alive


def _watched(tokens: HeldOutTokens, on_batch: OnBatch) -> Generator[Tensor]:
    """Yield the stored inputs, and call `on_batch` before each, which may stop the evaluation."""
    for x in tokens.stored_inputs:
        on_batch(len(tokens.batches), len(tokens.batches))
        yield x


@torch.no_grad()
def fired_on(sae: SAE[Any], batches: Iterable[Tensor]) -> tuple[Tensor, int]:
    """Return which latents fire on some sample, shape ``(d_sae,)``, and the number of samples."""
    fired, samples = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.device), 0
    for x in batches:
        fired |= sae.encode(x.to(sae.device, sae.dtype)).to_dense().ne(0).any(0)
        samples += len(x)
    return fired, samples


@torch.no_grad()
def _hierarchy_figure(sae: SAE[Any], shared: SharedPasses) -> dict[str, float]:
    if sum(len(x) for x in shared.each_inputs()) < FEWEST_SAMPLES:
        return {}
    metric = HierarchyScore(sae.W_dec)
    for x in shared.each_inputs():
        if metric.is_full:
            break
        metric.update(x, sae.encode(x.to(sae.device, sae.dtype)).to_dense())
    return {"hierarchy_score": metric.compute()}


def _shared_passes(
    model: Any, tokens: HeldOutTokens, hook: HookPoint, cfg: LanguageModelSAERunnerConfig[Any]
) -> SharedPasses | None:
    if hook not in tokens.shared:
        kwargs, batches = cfg.model_kwargs, tokens.batches
        from_hook = model_from_hook(model, hook.name, kwargs, batches[0])
        if from_hook is None:
            tokens.shared[hook] = None
            warnings.warn(
                f"the evaluation runs the whole model three times for each SAE: from {hook.name} "
                "on, it does not give the same logits",
                stacklevel=3,
            )
        else:
            excluded = _excluded(cfg, model)
            tokens.shared[hook] = SharedPasses(from_hook, hook, batches, excluded)
    return tokens.shared[hook]


def _excluded(cfg: LanguageModelSAERunnerConfig[Any], model: Any) -> list[int]:
    excluded = cfg.exclude_special_tokens
    if isinstance(excluded, bool):
        return get_special_token_ids(model.tokenizer) if excluded else []
    return list(excluded)


@contextmanager
def flat_heads(sae: SAE[Any]) -> Generator[None]:
    """Let an SAE at `hook_z` take activations without a dimension of heads, as SAELens does."""
    reshapes = sae.hook_z_reshaping_mode
    if reshapes:
        sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        if reshapes:
            sae.turn_on_forward_pass_hook_z_reshaping()


def _figures_of_saelens(
    sae: SAE[Any], model: Any, tokens: HeldOutTokens, cfg: LanguageModelSAERunnerConfig[Any]
) -> tuple[dict[str, float], dict[str, Any]]:
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
    return {name: value for group in groups.values() for name, value in group.items()}, per_latent
