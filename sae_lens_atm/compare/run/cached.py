"""SAEs of a comparison on cached activations of a language model."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from sae_lens import TrainingSAE
from torch import Tensor

from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.compare.run.curve import HELD_OUT_SAMPLES, HeldOutBatch
from sae_lens_atm.compare.run.language_model_figures import evaluate_group
from sae_lens_atm.data.activation_cache import (
    ActivationCache,
    CachedBatches,
    CacheSettings,
    held_out_contexts,
)
from sae_lens_atm.data.cache_writer import check_cache_folder, is_complete, plan_cache
from sae_lens_atm.data.language_model import load_language_model
from sae_lens_atm.training.cached_run import cache_activations, held_out_tokens, open_cache
from sae_lens_atm.training.hooks import StopFlag
from sae_lens_atm.training.phases import LOADING_MODEL, OnPhase, Phase
from sae_lens_atm.training.run_file import LanguageModelRun


class CachedData(NamedTuple):
    """The cached activations that a run is trained on."""

    planned: PlannedRun
    cache: ActivationCache

    def batches(self, served: int) -> Iterator[Tensor]:
        """Return the batches after the first `served` ones."""
        cfg = cast(LanguageModelRun, self.planned.run).runner
        rows = self.cache.rows(held_out_contexts(cfg))
        return CachedBatches(
            self.cache, rows, cfg.train_batch_size_tokens, self.planned.seed, served
        )

    def held_out(self) -> HeldOutBatch:
        """Return activations of the contexts that are kept for the evaluation."""
        cfg = cast(LanguageModelRun, self.planned.run).runner
        rows = self.cache.rows(0, held_out_contexts(cfg))
        chosen = np.random.default_rng(0).permutation(rows)[:HELD_OUT_SAMPLES]
        return HeldOutBatch(self.cache.read(np.sort(chosen)).to(cfg.device))

    def groups(self, sae: TrainingSAE[Any]) -> dict[str, list[int]]:
        """Return all latents as one group."""
        return {"all latents": list(range(sae.cfg.d_sae))}


def longest_run(planned: Sequence[PlannedRun]) -> LanguageModelRun:
    """Return the run with the most training tokens, which sets the size of the cache."""
    runs = (cast(LanguageModelRun, p.run) for p in planned)
    return max(runs, key=lambda run: run.runner.training_tokens)


def contexts_to_cache(planned: Sequence[PlannedRun]) -> int:
    """Return how many contexts of text the model must read; 0 if the cache is complete.

    Raises:
        SettingsError: the cache is of something else, or cannot be written.
    """
    run = longest_run(planned)
    settings = cast(CacheSettings, run.activations)
    if is_complete(settings.folder):
        open_cache(run)
        return 0
    plan = plan_cache(run.runner, settings)
    check_cache_folder(run.runner, settings, plan)
    return plan.contexts


def make_cache(planned: Sequence[PlannedRun], on_progress: Callable[[int, int], None]) -> None:
    """Write the cache that all runs read."""
    cache_activations(longest_run(planned), on_progress)


def evaluate_cached(
    group: Sequence[PlannedRun],
    folder: Path,
    stop: StopFlag,
    on_phase: OnPhase,
    on_sae: Callable[[int], None],
) -> None:
    """Evaluate saved SAEs, with one load of the model, as `evaluate_group` does."""
    run = cast(LanguageModelRun, group[0].run)
    on_phase(Phase(LOADING_MODEL))
    model = load_language_model(run.runner)
    tokens = held_out_tokens(open_cache(run), run)
    evaluate_group(group, folder, model, tokens, stop, on_phase, on_sae)
