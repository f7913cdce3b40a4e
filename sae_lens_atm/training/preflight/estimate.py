"""The table of `train --dry-run`: what a run does, in which phase, and how long that takes."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import LanguageModelSAERunnerConfig, SAETrainer
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from sae_lens_atm.data.language_model import check_hook
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.language_model import HeldOutTokens, make_store
from sae_lens_atm.evaluation.synthetic import evaluate
from sae_lens_atm.training.checkpoints import samples_of
from sae_lens_atm.training.preflight.amounts import (
    checkpoints_left,
    estimation_batches,
    evaluations_in_training,
    llm_batches_of,
)
from sae_lens_atm.training.preflight.checks import check_devices
from sae_lens_atm.training.preflight.memory import GIB, available_bytes, stream_bytes
from sae_lens_atm.training.preflight.model_facts import (
    NotChecked,
    is_at_hand,
    look_up_model,
    shape_of,
    short,
)
from sae_lens_atm.training.preflight.timing import (
    NotTimed,
    Timed,
    sizes_up_to,
    synchronize,
    time_checkpoint,
    time_steps,
    time_work,
    timed_trainer,
)
from sae_lens_atm.training.ranks import size as number_of_processes
from sae_lens_atm.training.run_file import LanguageModelRun, Run, SyntheticRun, batch_size_of
from sae_lens_atm.training.synthetic_run import build_synthetic_model

BEFORE, TRAINING, AFTER = "before step 1", "training", "after training"
SECONDS = 20.0
"""Time limit for the measurements. Loading the model and the data comes on top."""
Report = Callable[[str], None]
"""Is called with the name of each measurement before it starts."""


class Entry(NamedTuple):
    """One row of the table."""

    phase: str
    what: str
    seconds: float | None
    """None if it was not timed."""
    reason: str = ""
    """Why it was not timed."""


def estimate_time(
    run: Run,
    checkpoint: Path | None = None,
    limit: float = SECONDS,
    report: Report = lambda _: None,
) -> list[Entry]:
    """Estimate the time of each phase of a run, from a few steps on its device.

    Args:
        run: the run, checked.
        checkpoint: the checkpoint that it resumes from.
        limit: seconds for the measurements.
        report: is called before each measurement.
    """
    try:
        check_devices(run)
    except SettingsError as error:
        return [Entry(TRAINING, "everything", None, str(error))]
    done = 0 if checkpoint is None else max(samples_of(checkpoint), 0)
    first = done // batch_size_of(run)
    share = batch_size_of(run) // number_of_processes()
    report("training steps of the SAE")
    try:
        with timed_trainer(run, share) as trainer:
            parts = time_steps(run, trainer, 0.4 * limit, first, share)
            entries = [_steps_entry(parts, share)]
            estimate = _synthetic if isinstance(run, SyntheticRun) else _language_model
            entries += estimate(run, trainer, first, checkpoint is None, limit, report)  # pyright: ignore[reportArgumentType]
            entries += _checkpoints(run, trainer, first, report)
    except NotTimed as reason:
        return [Entry(TRAINING, "everything", None, str(reason))]
    order = (BEFORE, TRAINING, AFTER)
    return sorted(entries, key=lambda entry: order.index(entry.phase))


def _steps_entry(parts: list[tuple[Timed, int]], batch: int) -> Entry:
    steps = sum(number for _, number in parts)
    total = sum(timed.seconds * number for timed, number in parts)
    note = max((timed.note for timed, _ in parts), default="")
    return Entry(TRAINING, f"SAE: {steps:,} steps of {batch:,}{note}", total)


def _checkpoints(
    run: Run, trainer: SAETrainer[Any, Any], first: int, report: Report
) -> list[Entry]:
    number = checkpoints_left(run, first)
    if not number:
        return []
    report("a checkpoint")
    more = stream_bytes(run.runner) if isinstance(run, LanguageModelRun) else 0
    what = f"{number:,} checkpoints"
    try:
        return [Entry(TRAINING, what, number * time_checkpoint(trainer, more))]
    except NotTimed as reason:
        return [Entry(TRAINING, what, None, str(reason))]


# --- synthetic data ------------------------------------------------------------------------------


def _synthetic(
    run: SyntheticRun,
    trainer: SAETrainer[Any, Any],
    first: int,
    estimates: bool,
    limit: float,
    report: Report,
) -> list[Entry]:
    cfg = run.runner
    report("building the synthetic model")
    start = time.perf_counter()
    try:
        model = build_synthetic_model(run)
    except Exception as error:  # it may be on the Hub
        return [Entry(BEFORE, "synthetic data and evaluation", None, short(error))]
    entries = [Entry(BEFORE, "build the synthetic model", time.perf_counter() - start)]

    def draw(samples: int) -> None:
        model.sample(samples)
        synchronize(cfg.device)

    report("drawing batches")
    drawn = time_work(draw, sizes_up_to(cfg.batch_size), 0.2 * limit)
    before = estimation_batches(run) if estimates else 0
    if before:
        what = f"estimate the activation scale: {before:,} batches of {cfg.batch_size:,}"
        entries.append(Entry(BEFORE, what, before * drawn.seconds))
    steps = cfg.total_training_steps - first
    entries.append(Entry(TRAINING, f"draw {steps:,} batches", steps * drawn.seconds))
    in_training, final = evaluations_in_training(run, first), int(cfg.run_final_eval)
    if cfg.eval_samples > 0 and in_training + final:
        report("evaluation")
        timed = time_work(
            lambda samples: evaluate(trainer.sae, model, samples, 0, cfg.batch_size),
            sizes_up_to(cfg.eval_samples, 256),
            0.3 * limit,
        )
        what = f"of {cfg.eval_samples:,} samples{timed.note}"
        if in_training:
            seconds = in_training * timed.seconds
            entries.append(Entry(TRAINING, f"{in_training:,} evaluations {what}", seconds))
        if final:
            entries.append(Entry(AFTER, f"evaluation {what}", timed.seconds))
    return entries


# --- language models -----------------------------------------------------------------------------


def _language_model(
    run: LanguageModelRun,
    trainer: SAETrainer[Any, Any],
    first: int,
    estimates: bool,
    limit: float,
    report: Report,
) -> list[Entry]:
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
    entries.append(
        Entry(
            BEFORE, f"fill the buffer: {fill:,} model batches of {shape}{timed.note}", fill * each
        )
    )
    if estimated:
        number = until_step_1 - fill
        entries.append(
            Entry(
                BEFORE,
                f"estimate the activation scale: {estimation_batches(run):,} training batches, "
                f"{number:,} model batches",
                number * each,
            )
        )
    number = max(whole - until_step_1, 0)
    entries.append(Entry(TRAINING, f"language model: {number:,} model batches", number * each))
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
            f"{cfg.model_name} needs {needed / GIB:.1f} GiB, and {cfg.llm_device} has "
            f"{free / GIB:.1f} GiB free"
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
        return model, make_store(cfg, model)
    except SettingsError:
        raise
    except Exception as error:  # errors of the loaders are of many types
        raise NotTimed(short(error)) from error


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
    prompts = cfg.eval_batch_size_prompts or cfg.store_batch_size_prompts
    tokens = tokens.repeat(-(-prompts // len(tokens)), 1)[:prompts]
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_head_index = (
        cfg.hook_name,
        cfg.hook_head_index,
    )

    def evaluate_one_batch(size: int) -> None:
        part = _part_of(tokens, size)
        with suppress(ZeroDivisionError):  # zeroing the hook may leave the loss as it is
            run_evals(
                sae,
                HeldOutTokens([part], part.shape[1], len(part)),  # pyright: ignore[reportArgumentType]
                model,
                ActivationScaler(),
                EvalConfig(
                    batch_size_prompts=len(part),
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

    report("evaluation with the language model")
    sae.eval()
    timed = time_work(evaluate_one_batch, _token_sizes(tokens), 0.3 * limit)
    seconds = cfg.n_eval_batches * timed.seconds
    what = (
        f"{cfg.n_eval_batches:,} batches of {prompts:,} x {cfg.context_size:,} tokens{timed.note}"
    )
    entries = [Entry(AFTER, f"evaluation: {what}", seconds)]
    number = evaluations_in_training(run, first)
    if number:
        entries.append(Entry(TRAINING, f"{number:,} evaluations of {what}", number * seconds))
    return entries


def _token_sizes(tokens: Tensor) -> list[int]:
    """Return numbers of tokens to time: a part of one prompt, one prompt, all prompts."""
    context = tokens.shape[1]
    return sorted({min(16, context), context, tokens.numel()})


def _part_of(tokens: Tensor, size: int) -> Tensor:
    """Return part of the first prompt, or the first prompts, with `size` tokens in all."""
    context = tokens.shape[1]
    return tokens[:1, :size] if size <= context else tokens[: size // context]
