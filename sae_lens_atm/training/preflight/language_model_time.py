"""Time the language model of a run: its forward passes and the evaluation with it."""

from contextlib import suppress
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig, SAETrainer, TrainingSAE
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from sae_lens_atm.evaluation.language_model import HeldOutTokens
from sae_lens_atm.training.hooks import synchronize
from sae_lens_atm.training.phases import LOADING_MODEL
from sae_lens_atm.training.preflight.amounts import (
    SCALED,
    estimation_batches,
    evaluations_in_training,
    llm_batches_of,
)
from sae_lens_atm.training.preflight.timed_model import TimedModel, part_of, token_sizes
from sae_lens_atm.training.preflight.timing import (
    AFTER,
    BEFORE,
    TRAINING,
    Entry,
    NotTimed,
    Report,
    time_work,
)
from sae_lens_atm.training.run_file import LanguageModelRun
from sae_lens_atm.training.scale import ACCURACY


def language_model_entries(
    run: LanguageModelRun,
    trainer: SAETrainer[Any, Any],
    first: int,
    estimates: bool,
    limit: float,
    report: Report,
) -> list[Entry]:
    """Time the language model and the evaluation of a run.

    Args:
        run: the run.
        trainer: its trainer, from `timed_trainer`.
        first: the first step.
        estimates: whether the scale of the activations is estimated before that step.
        limit: seconds for the measurements of the whole run.
        report: is called before each measurement.
    """
    cfg = run.runner
    try:
        if cfg.use_cached_activations:
            raise NotTimed("the run reads cached activations")
        report(LOADING_MODEL)
        timed_model = TimedModel.load(cfg)
    except NotTimed as reason:
        return [Entry(TRAINING, "language model and evaluation", None, str(reason))]
    evaluations = _evaluations(run, trainer.sae, timed_model, first, limit, report)
    if run.activations is not None:
        return [Entry(AFTER, "load the language model", timed_model.loading), *evaluations]
    report("batches of the language model")
    return [*_batches(run, timed_model, first, estimates, limit), *evaluations]


def _batches(
    run: LanguageModelRun, timed_model: TimedModel, first: int, estimates: bool, limit: float
) -> list[Entry]:
    """Return the time of the batches of the model before and during training."""
    cfg = run.runner
    what = "load the language model and open the dataset"
    entries = [Entry(BEFORE, what, timed_model.loading)]
    timed = timed_model.time_batch(0.3 * limit)
    each, share_kept = timed.seconds, timed_model.share_kept
    batch = cfg.train_batch_size_tokens
    estimated = estimation_batches(run) * batch if estimates else 0
    trained = cfg.training_tokens - first * batch
    fill = llm_batches_of(cfg, 1, share_kept)
    until_step_1 = max(llm_batches_of(cfg, estimated + 1, share_kept), fill)
    whole = llm_batches_of(cfg, estimated + trained, share_kept)
    shape = f"{cfg.store_batch_size_prompts:,} x {cfg.context_size:,} tokens"
    parallel = ", in parallel to the SAE (prefetch_llm_batches)" if cfg.prefetch_llm_batches else ""
    what = f"fill the buffer: {fill:,} model batches of {shape}{timed.note}"
    entries.append(Entry(BEFORE, what, fill * each))
    if estimated:
        number = until_step_1 - fill
        what = f"estimate the activation scale: {number:,} model batches at most"
        if cfg.sae.normalize_activations == SCALED:
            what += f", fewer when the standard error is below {ACCURACY:.1%}"
        entries.append(Entry(BEFORE, what, number * each))
    number = max(whole - until_step_1, 0)
    entries.append(
        Entry(TRAINING, f"language model: {number:,} model batches{parallel}", number * each)
    )
    return entries


def _evaluations(
    run: LanguageModelRun,
    sae: TrainingSAE[Any],
    timed_model: TimedModel,
    first: int,
    limit: float,
    report: Report,
) -> list[Entry]:
    cfg = run.runner
    if cfg.n_eval_batches <= 0:
        return []
    sae.eval()
    number = evaluations_in_training(run, first)
    prompts = cfg.eval_batch_size_prompts or cfg.store_batch_size_prompts
    shape = f"{cfg.n_eval_batches:,} batches of {prompts:,} x {cfg.context_size:,} tokens"
    report("evaluation with the language model")
    timed = timed_model.time_evaluation(sae, (0.15 if number else 0.3) * limit).first
    entries = [Entry(AFTER, f"evaluation: {shape}{timed.note}", timed.seconds)]
    if number:
        report("SAELens' evaluation in training")
        tokens = timed_model.evaluated
        timed = time_work(
            lambda size: _evaluate_as_saelens(sae, timed_model.model, part_of(tokens, size), cfg),
            token_sizes(tokens),
            0.15 * limit,
        )
        seconds = number * cfg.n_eval_batches * timed.seconds
        entries.append(Entry(TRAINING, f"{number:,} evaluations of {shape}{timed.note}", seconds))
    return entries


def _evaluate_as_saelens(
    sae: Any, model: Any, tokens: Tensor, cfg: LanguageModelSAERunnerConfig[Any]
) -> None:
    """Evaluate a batch as SAELens does in training, for wandb."""
    with suppress(ZeroDivisionError):  # zeroing the hook may leave the loss as it is
        run_evals(
            sae,
            HeldOutTokens([tokens], tokens.shape[1], len(tokens)),  # pyright: ignore[reportArgumentType]
            model,
            ActivationScaler(),
            EvalConfig(
                batch_size_prompts=len(tokens),
                n_eval_reconstruction_batches=1,
                n_eval_sparsity_variance_batches=1,
                compute_ce_loss=True,
                compute_l2_norms=True,
                compute_sparsity_metrics=True,
                compute_variance_metrics=True,
            ),
            model_kwargs=cfg.model_kwargs,
            exclude_special_tokens=cfg.exclude_special_tokens,
        )
    synchronize(cfg.llm_device or cfg.device)
