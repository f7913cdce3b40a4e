"""Runs on cached activations of a language model, without the model."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from sae_lens import TrainingSAE
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.data.activation_cache import ActivationCache, CachedBatches, held_out_contexts
from sae_lens_atm.data.cache_writer import (
    check_cache_folder,
    plan_cache,
    whole_contexts,
    write_cache,
)
from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.evaluation.language_model import (
    HeldOutTokens,
    make_store,
)
from sae_lens_atm.evaluation.next_token_loss import TOKENS
from sae_lens_atm.files import locked
from sae_lens_atm.training.fit import PreparedRun, RunContext
from sae_lens_atm.training.language_model_run import SupervisedRunner, figures_of_saved
from sae_lens_atm.training.phases import LOADING_MODEL, Phase
from sae_lens_atm.training.run_file import LanguageModelRun

_DEAD_WINDOW = 50_000
"""Number of stored activations on which dead latents are counted."""


class CachedRunner(SupervisedRunner):
    """SAELens' language-model runner with a cache in place of model and activation store."""

    @override
    def __init__(self, run: LanguageModelRun, batches: CachedBatches, context: RunContext) -> None:
        # SAELens' own constructor would load the model and the dataset.
        self.cfg, self.run_settings, self.context = run.runner, run, context
        self.sae = TrainingSAE[Any].from_dict(run.runner.sae.to_dict()).to(run.runner.device)
        self.activations_store: Any = batches
        self.evaluator: Any = None  # SAELens' evaluation during training needs the model


def cache_activations(run: LanguageModelRun, on_progress: Callable[[int, int], None]) -> None:
    """Run the model once and write the cache of a run. A stopped cache goes on where it was.

    Args:
        run: the run.
        on_progress: is called after each model batch with the number of contexts that are done,
            and of all contexts. It may raise an error to stop.

    Raises:
        SettingsError: model or dataset cannot be read, or the folder holds something else.
        SaveError: the disk is full, for example. Complete files stay.
    """
    assert run.activations is not None
    plan = plan_cache(run.runner, run.activations)
    check_cache_folder(run.runner, run.activations, plan)
    with locked(run.activations.folder, "activations.cache"):
        store = whole_contexts(make_store(run.runner, load_language_model(run.runner)))
        for done in write_cache(run.runner, run.activations, store):
            on_progress(done, plan.contexts)


def open_cache(run: LanguageModelRun) -> ActivationCache:
    """Open the cache of a run.

    Raises:
        SettingsError: it is missing, damaged, or of another model, hook or dataset.
    """
    assert run.activations is not None
    return ActivationCache(run.activations.folder, run.runner)


def prepare_cached(run: LanguageModelRun, context: RunContext) -> PreparedRun:
    """Open the cache of a run, and restore the position in it.

    Raises:
        SettingsError: the cache is missing, damaged, or of another model, hook or dataset.
    """
    cfg, cache = run.runner, open_cache(run)
    cfg.resume_from_checkpoint = None if context.checkpoint is None else str(context.checkpoint)
    cfg.prefetch_llm_batches = False  # a thread that reads ahead would move the saved position
    batches = CachedBatches(
        cache,
        cache.rows(held_out_contexts(cfg)),
        cfg.train_batch_size_tokens,
        run.seed,
        own_rows=None if context.ranks is None else context.ranks.own_rows,
    )
    runner = CachedRunner(run, batches, context)

    def fit_and_save() -> tuple[TrainingSAE[Any], int]:
        return runner.run(), runner.skipped_batches

    def final_evaluation(_: TrainingSAE[Any]) -> dict[str, float]:
        if cfg.n_eval_batches <= 0:
            return {}
        context.on_phase(Phase(LOADING_MODEL))
        model = load_language_model(cfg)
        return figures_of_saved(run, model, held_out_tokens(cache, run), context.on_phase)

    return PreparedRun(fit_and_save, final_evaluation)


def held_out_tokens(cache: ActivationCache, run: LanguageModelRun) -> HeldOutTokens:
    """Return the tokens of a cache on which SAEs are evaluated. No run trains on them.

    Dead latents are counted on stored activations of other tokens, too.
    """
    cfg = run.runner
    tokens = torch.from_numpy(cache.tokens[: held_out_contexts(cfg)]).long()
    held_out = HeldOutTokens.from_rows(tokens.to(cfg.llm_device or cfg.device))
    held_out.stored_inputs = _StoredInputs(cache, cache.rows(held_out_contexts(cfg))[:_DEAD_WINDOW])
    return held_out


class _StoredInputs(Iterable[Tensor]):
    """Batches of stored activations, the same on each pass."""

    def __init__(self, cache: ActivationCache, rows: NDArray[Any]) -> None:
        self._cache, self._rows = cache, rows

    @override
    def __iter__(self) -> Iterator[Tensor]:
        for first in range(0, len(self._rows), TOKENS):
            yield self._cache.read(self._rows[first : first + TOKENS])
