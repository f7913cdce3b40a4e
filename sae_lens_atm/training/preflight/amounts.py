"""How much work a run does before, during and after training, counted from its settings."""

import math
from itertools import pairwise
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig

from sae_lens_atm.sae.config import ATMTrainingSAEConfig
from sae_lens_atm.training.checkpoints import ESTIMATED_SCALES
from sae_lens_atm.training.run_file import LanguageModelRun, Run

SCALED = "expected_average_only_in"
_COUNTED = 100_000


def estimation_batches(run: Run) -> int:
    """Return how many batches are read before step 1 at most, to estimate the scale."""
    if run.runner.sae.normalize_activations not in ESTIMATED_SCALES:
        return 0
    return run.runner.n_batches_for_norm_estimate


def schedule_parts(cfg: Any, first: int, steps: int) -> list[tuple[int, int]]:
    """Divide training into parts whose steps do the same work.

    Args:
        cfg: the training config of an SAE.
        first: the first step.
        steps: the number of steps of the whole training.

    Returns:
        The first step and the number of steps of each part. For an ATM SAE, a part ends where
        masks, one of our losses or `per_sample_end` begin or end.
    """
    edges = {first, steps}
    if isinstance(cfg, ATMTrainingSAEConfig):
        if cfg.mask_rate > 0:
            edges |= {cfg.mask_warm_up_steps}
            edges |= {cfg.mask_end_step} if cfg.mask_end < 1 else set()
        edges |= {cfg.parent_start_step} if cfg.parent_weight > 0 else set()
        if cfg.frequency_penalty > 0 and cfg.frequency_penalty_end < 1:
            edges |= {round(cfg.frequency_penalty_end_step)}
        if cfg.budget_weight > 0 and cfg.budget_end < 1:
            edges |= {round(cfg.budget_end_step)}
        edges |= {cfg.per_sample_end_step} if cfg.activation == "batchtopk" else set()
    inside = sorted(edge for edge in edges if first <= edge <= steps)
    return [(a, b - a) for a, b in pairwise(inside)]


def llm_batches(served: float, buffer: int, batch: int, llm_batch: float, mixing: float) -> int:
    """Return how many batches the language model computes to serve a number of tokens.

    SAELens' `mixing_buffer` collects at least `buffer` tokens, keeps the share `mixing` of the
    buffer for the next round, and serves the rest in whole training batches. After `_COUNTED`
    batches, the rest is one batch for every `llm_batch` tokens, as it is on average.

    Args:
        served: tokens to serve.
        buffer: tokens in the buffer.
        batch: tokens in a training batch.
        llm_batch: tokens in a batch of the language model, without those that are excluded.
        mixing: share of the buffer that is kept.
    """
    stored, given, count = 0.0, 0, 0
    while given < served and count < _COUNTED:
        stored, count = stored + llm_batch, count + 1
        if stored >= buffer:
            tokens = max(1, int(stored - int(buffer * mixing)) // batch) * batch
            stored, given = stored - tokens, given + tokens
    return count + max(math.ceil((served - given - stored) / llm_batch), 0)


def llm_batches_of(
    cfg: LanguageModelSAERunnerConfig[Any], served: float, share_kept: float = 1.0
) -> int:
    """Return `llm_batches` with the settings of a run."""
    context = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    return llm_batches(
        served,
        cfg.n_batches_in_buffer * context,
        cfg.train_batch_size_tokens,
        cfg.store_batch_size_prompts * context * share_kept,
        cfg.activations_mixing_fraction,
    )


def evaluations_in_training(run: Run, first: int = 0) -> int:
    """Return how often SAELens evaluates the SAE after step `first`. Without wandb it does not."""
    logger, steps = run.runner.logger, run.runner.total_training_steps
    if not logger.log_to_wandb:
        return 0
    if not isinstance(run, LanguageModelRun) and run.runner.eval_frequency <= 0:
        return 0
    every = logger.wandb_log_frequency * logger.eval_every_n_wandb_logs
    return steps // every - first // every


def checkpoints_left(run: Run, first: int = 0) -> int:
    """Return how many checkpoints are saved from step `first` on, without interruptions."""
    cfg, steps = run.runner, run.runner.total_training_steps
    periodic = cfg.n_checkpoints * (steps - first) / max(steps, 1)
    return round(periodic) + int(cfg.save_final_checkpoint)
