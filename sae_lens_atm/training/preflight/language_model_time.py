"""Time the language model of a run: its forward passes and the evaluation with it."""

import time
from contextlib import suppress
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, SAETrainer
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from sae_lens_atm.data.language_model import check_hook
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.language_model import (
    HeldOutTokens,
    language_model_figures,
    make_store,
)
from sae_lens_atm.training.preflight.amounts import (
    estimation_batches,
    evaluations_in_training,
    llm_batches_of,
)
from sae_lens_atm.training.preflight.memory import available_bytes, size_text
from sae_lens_atm.training.preflight.model_facts import (
    NotChecked,
    is_at_hand,
    look_up_model,
    shape_of,
    short,
)
from sae_lens_atm.training.preflight.timing import (
    AFTER,
    BEFORE,
    TRAINING,
    Entry,
    NotTimed,
    Report,
    synchronize,
    time_work,
)
from sae_lens_atm.training.run_file import LanguageModelRun


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
    what = "language model and evaluation"
    try:
        if cfg.use_cached_activations:
            raise NotTimed("the run reads cached activations")
        report("loading the language model")
        start = time.perf_counter()
        model, store = _load(cfg)
        loaded = time.perf_counter() - start
    except NotTimed as reason:
        return [Entry(TRAINING, what, None, str(reason))]
    entries = [Entry(BEFORE, "load the language model and open the dataset", loaded)]
    report("batches of the language model")
    tokens: Tensor = store.get_batch_tokens()
    start = time.perf_counter()
    tokens = store.get_batch_tokens()
    reading = time.perf_counter() - start
    share_kept = 1.0
    if store.exclude_special_tokens is not None:
        special = torch.isin(tokens, store.exclude_special_tokens.to(tokens.device))
        share_kept = max(1 - special.float().mean().item(), 1 / tokens.numel())

    def forward(size: int) -> None:
        store.get_activations(_part_of(tokens, size))
        synchronize(cfg.llm_device or cfg.device)

    sizes = _token_sizes(tokens)
    timed = time_work(forward, sizes, 0.3 * limit)
    each = reading + timed.seconds

    batch = cfg.train_batch_size_tokens
    estimated = estimation_batches(run) * batch if estimates else 0
    trained = cfg.training_tokens - first * batch
    fill = llm_batches_of(cfg, 1, share_kept)
    until_step_1 = max(llm_batches_of(cfg, estimated + 1, share_kept), fill)
    whole = llm_batches_of(cfg, estimated + trained, share_kept)
    shape = f"{len(tokens):,} x {cfg.context_size:,} tokens"
    parallel = ", in parallel to the SAE (prefetch_llm_batches)" if cfg.prefetch_llm_batches else ""
    what = f"fill the buffer: {fill:,} model batches of {shape}{timed.note}"
    entries.append(Entry(BEFORE, what, fill * each))
    if estimated:
        number = until_step_1 - fill
        what = f"estimate the activation scale: {estimation_batches(run):,} training batches, "
        entries.append(Entry(BEFORE, f"{what}{number:,} model batches", number * each))
    number = max(whole - until_step_1, 0)
    entries.append(
        Entry(TRAINING, f"language model: {number:,} model batches{parallel}", number * each)
    )
    return entries + _evaluations(run, trainer, model, tokens, first, limit, report)


def _load(cfg: LanguageModelSAERunnerConfig[Any]) -> tuple[Any, Any]:
    """Load the model and SAELens' activation store, without a download."""
    try:
        if not is_at_hand(cfg):
            raise NotTimed(f"{cfg.model_name} is not on this machine")
        shape = shape_of(cfg, look_up_model(cfg, online=False))
    except NotChecked as reason:
        raise NotTimed(str(reason)) from reason
    needed, free = shape.parameters * shape.dtype.itemsize, available_bytes(cfg.llm_device)
    if free is not None and needed > 0.9 * free:
        raise NotTimed(
            f"{cfg.model_name} needs {size_text(needed)}, and {cfg.llm_device} has "
            f"{size_text(free)} free"
        )
    try:
        model = load_model(
            cfg.model_class_name,
            cfg.model_name,
            device=cfg.llm_device,
            model_from_pretrained_kwargs=cfg.model_from_pretrained_kwargs,
            hook_names=[cfg.hook_name],
        )
        check_hook(cfg, model)
    except SettingsError:
        raise
    except Exception as error:  # errors of the loaders are of many types
        raise NotTimed(short(error)) from error
    try:
        return model, make_store(cfg, model)
    except SettingsError as error:  # the dataset may be out of reach here alone
        raise NotTimed(str(error)) from error


def _evaluations(
    run: LanguageModelRun,
    trainer: SAETrainer[Any, Any],
    model: Any,
    tokens: Tensor,
    first: int,
    limit: float,
    report: Report,
) -> list[Entry]:
    cfg, sae = run.runner, trainer.sae
    if cfg.n_eval_batches <= 0:
        return []
    sae.eval()
    sae.cfg.metadata.hook_name = cfg.hook_name
    sae.cfg.metadata.hook_head_index = cfg.hook_head_index
    prompts = cfg.eval_batch_size_prompts or cfg.store_batch_size_prompts
    tokens = tokens.repeat(-(-prompts // len(tokens)), 1)[:prompts]
    number = evaluations_in_training(run, first)
    shape = f"{cfg.n_eval_batches:,} batches of {prompts:,} x {cfg.context_size:,} tokens"

    def evaluate(size: int) -> None:
        language_model_figures(sae, model, HeldOutTokens.from_rows(_part_of(tokens, size)), cfg)
        synchronize(cfg.llm_device or cfg.device)

    report("evaluation with the language model")
    timed = time_work(evaluate, _token_sizes(tokens), (0.15 if number else 0.3) * limit)
    seconds = cfg.n_eval_batches * timed.seconds
    entries = [Entry(AFTER, f"evaluation: {shape}{timed.note}", seconds)]
    if number:
        report("SAELens' evaluation in training")
        timed = time_work(
            lambda size: _evaluate_as_saelens(sae, model, _part_of(tokens, size), cfg),
            _token_sizes(tokens),
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


def _token_sizes(tokens: Tensor) -> list[int]:
    """Return numbers of tokens to time: a part of one prompt, one prompt, all prompts."""
    context = tokens.shape[1]
    return sorted({min(16, context), context, tokens.numel()})


def _part_of(tokens: Tensor, size: int) -> Tensor:
    """Return part of the first prompt, or the first prompts, with `size` tokens in all."""
    context = tokens.shape[1]
    return tokens[:1, :size] if size <= context else tokens[: size // context]
