"""Check a run before it starts, and describe what it will do."""

import warnings
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.constants import SAE_CFG_FILENAME

from sae_lens_atm.data.activation_cache import ActivationCache, held_out_contexts
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.files import check_writable
from sae_lens_atm.sae.config import ATMTrainingSAEConfig
from sae_lens_atm.torchrun import rank
from sae_lens_atm.torchrun import size as number_of_processes
from sae_lens_atm.training.checkpoints import check_resumable, is_checkpoint
from sae_lens_atm.training.preflight.amounts import SCALED, estimation_batches
from sae_lens_atm.training.preflight.lookups import check_files, look_up
from sae_lens_atm.training.preflight.memory import (
    sae_size,
    size_text,
    step_bytes,
    store_bytes,
    synthetic_bytes,
    total_bytes,
)
from sae_lens_atm.training.ranks import check_shares
from sae_lens_atm.training.run_file import (
    LanguageModelRun,
    Run,
    SyntheticRun,
    batch_size_of,
    training_steps,
)
from sae_lens_atm.training.scale import ACCURACY


def check_run(
    run: Run, checkpoint: Path | None = None, dry: bool = False, extend: int = 0
) -> dict[str, Any]:
    """Check a run without loading data or models, and return facts about it for a table.

    Args:
        run: the run.
        checkpoint: the checkpoint that it resumes from, found by `newest_checkpoint`.
        dry: also look up model, hook and dataset (`look_up`).
        extend: number of samples by which the run is longer than its settings.

    Raises:
        SettingsError, CheckpointError: something does not fit.
    """
    cfg = run.runner
    output = check_output(run, checkpoint, extend > 0)
    facts: dict[str, Any] = {"architecture": cfg.sae.architecture()}
    if isinstance(run, LanguageModelRun):
        facts |= {
            "model": f"{run.runner.model_name} at {run.runner.hook_name}",
            "dataset": run.runner.dataset_path or "(none)",
        }
        check_data(run)
        if run.activations is not None:
            facts["activations"] = _describe_cache(run)
    check_shares(run)
    reason = never_masks(run)
    if reason is not None and rank() == 0:
        warnings.warn(reason, stacklevel=2)
    size, batch = sae_size(cfg.sae), batch_size_of(run)
    check_memory(run, size.resident)
    parameters = cfg.sae.d_sae * (2 * cfg.sae.d_in + 1) + cfg.sae.d_in
    needed = size.resident + size.parameters
    facts |= {
        "d_in, d_sae": f"{cfg.sae.d_in}, {cfg.sae.d_sae} ({parameters:,} parameters)",
        "steps": f"{training_steps(run):,}, each with {batch:,} {unit_of(run)}",
        "memory": f"{size_text(needed)} for the SAE (weights, gradients, Adam, averages), "
        "without activations",
        "output": output,
    }
    estimated = estimation_batches(run)
    if estimated and checkpoint is None:
        facts["before step 1"] = (
            f"at most {estimated:,} batches of {batch:,} to estimate the scale of the activations "
            "(n_batches_for_norm_estimate)"
        )
        if cfg.sae.normalize_activations == SCALED:
            facts["before step 1"] += f", fewer when the standard error is below {ACCURACY:.1%}"
    if number_of_processes() > 1:
        share = batch // number_of_processes()
        facts["processes"] = f"{number_of_processes()}, with {share:,} of each batch"
    if checkpoint is not None:
        check_resumable(checkpoint, run, extend)
        facts["resuming from"] = checkpoint
    if dry and isinstance(run, LanguageModelRun):
        facts |= look_up(run.runner)
    return facts


def has_masks(run: Run) -> bool:
    """Return whether a run is of ATM and its masks are not switched off."""
    cfg = run.runner.sae
    if not isinstance(cfg, ATMTrainingSAEConfig):
        return False
    return min(cfg.mask_rate, cfg.masked_weight, cfg.mask_end) > 0


def never_masks(run: Run) -> str | None:
    """Return why a run that has masks masks no latent in any step, or None if it does."""
    cfg, steps = run.runner.sae, run.runner.total_training_steps
    if not has_masks(run):
        return None
    start, end = cfg.mask_warm_up_steps, cfg.mask_end_step if cfg.mask_end < 1 else steps
    if start < min(steps, end):
        return None
    why = f"the run ends after {steps} steps" if steps <= end else f"mask_end ends it at step {end}"
    return (
        f"no latent will be masked: masking begins at step {start} (mask_warm_up_steps), and {why}"
    )


def check_data(run: LanguageModelRun, exists: bool = True) -> None:
    """Check settings of the data that SAELens checks only after it has loaded the model.

    Args:
        run: the run.
        exists: whether a local dataset must exist now. If not, it is made before the run.

    Raises:
        SettingsError: there is no dataset, model or dataset on this machine do not fit
            (`check_files`), the activation buffer is smaller than a batch, or the cache of the run
            is missing or of another model.
    """
    cfg = run.runner
    if cfg.use_cached_activations and run.activations is not None:
        raise SettingsError("use_cached_activations cannot be set beside `activations`")
    if run.activations is not None and exists:
        ActivationCache(run.activations.folder, cfg)
    cached = cfg.cached_activations_path if cfg.use_cached_activations else None
    if exists and cached is not None and not Path(cached).is_dir():
        raise SettingsError(
            f"cached_activations_path is {cached!r}: no such folder, and use_cached_activations is "
            "True"
        )
    if run.activations is not None or cfg.use_cached_activations:
        return
    if not cfg.dataset_path:
        raise SettingsError("dataset_path: missing, a language-model run needs a dataset")
    if exists:
        check_dataset_exists(cfg)
    positions = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    if cfg.n_batches_in_buffer * positions < cfg.train_batch_size_tokens:
        least = -(-cfg.train_batch_size_tokens // positions)
        counted = "context_size" if positions == cfg.context_size else "positions in seqpos_slice"
        raise SettingsError(
            f"n_batches_in_buffer must be {least} or more, got {cfg.n_batches_in_buffer}: times "
            f"{counted} = {positions} it must reach train_batch_size_tokens = "
            f"{cfg.train_batch_size_tokens}"
        )
    if exists:
        check_files(cfg)


def check_dataset_exists(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Check that a dataset that is named by a path exists.

    Raises:
        SettingsError: it does not.
    """
    is_path = cfg.dataset_path.startswith((".", "/", "~"))
    if is_path and not Path(cfg.dataset_path).exists():
        raise SettingsError(f"dataset_path is {cfg.dataset_path!r}: no such folder")


def _describe_cache(run: LanguageModelRun) -> str:
    assert run.activations is not None
    cfg, cache = run.runner, ActivationCache(run.activations.folder, run.runner)
    held_out = held_out_contexts(cfg)
    rows = max(len(cache.rows(held_out)), 1)
    return (
        f"{cache.folder}, {rows:,} for training: the run reads the cache "
        f"{cfg.training_tokens / rows:.1f} times; {held_out:,} contexts are kept for evaluation"
    )


def check_memory(run: Run, resident: int) -> None:
    """Check that a training step fits into the memory of its device, if the device is here.

    Args:
        run: the run.
        resident: what the SAE and the optimizer take, in bytes.

    Raises:
        SettingsError: it does not.
    """
    cfg, batch = run.runner, batch_size_of(run) // number_of_processes()
    total = total_bytes(cfg.device)
    needed = resident + step_bytes(cfg.sae, batch)
    causes = f"sae.d_sae = {cfg.sae.d_sae:,} and a batch of {batch:,}"
    if isinstance(run, LanguageModelRun):
        needed += store_bytes(run.runner)
        causes += (
            f" with n_batches_in_buffer = {run.runner.n_batches_in_buffer:,} and "
            f"store_batch_size_prompts = {run.runner.store_batch_size_prompts:,}"
        )
    elif not isinstance(run.runner.synthetic_model, str):
        features = run.runner.synthetic_model.num_features
        needed += synthetic_bytes(features, cfg.sae.d_in, batch_size_of(run))
    if total is not None and needed > total:
        raise SettingsError(
            f"{causes} need {size_text(needed)} of memory, and {cfg.device} has "
            f"{size_text(total)}: set smaller ones"
        )


def unit_of(run: Run) -> str:
    """Return what the batches of a run hold."""
    return "samples" if isinstance(run, SyntheticRun) else "tokens"


def check_devices(run: Run) -> None:
    """Check that the devices of a run exist. A dry run may be on another machine than the run.

    Raises:
        SettingsError: one of them does not.
    """
    cfg = run.runner
    devices = {"device": cfg.device, "sae.device": cfg.sae.device}
    if isinstance(run, LanguageModelRun):
        devices |= {"llm_device": run.runner.llm_device or ""}
    for name, device in devices.items():
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise SettingsError(f"{name} is {device!r}: this machine has no CUDA device")
        if device == "cpu" or not device:
            continue
        try:
            torch.empty(1, device=device)
        except Exception as error:  # backends that are not installed fail in many ways
            raise SettingsError(f"{name} is {device!r}: this machine has no such device") from error


def check_output(run: Run, checkpoint: Path | None = None, extends: bool = False) -> Path:
    """Check that the run's folder can be written and holds no other run. Return the folder.

    Args:
        run: the run.
        checkpoint: the checkpoint that it resumes from.
        extends: whether it may replace the finished SAE in its folder by a longer one.

    Raises:
        SettingsError: it cannot, or it does. The message says what to do.
    """
    output = Path(run.runner.output_path or "")
    checkpoints = Path(run.runner.checkpoint_path or "")
    setting = "output_path" if output in checkpoints.parents else "checkpoint_path"
    check_writable("output_path", output)
    check_writable(setting, checkpoints)
    if (output / SAE_CFG_FILENAME).exists() and not extends:
        raise SettingsError(
            f"output_path {output} already holds a finished SAE: choose another folder"
        )
    if checkpoint is None and any(is_checkpoint(folder) for folder in checkpoints.glob("*")):
        raise SettingsError(
            f"{checkpoints} holds checkpoints of another run: resume it with "
            f"--resume {checkpoints}, or choose another {setting}"
        )
    return output
