"""What a run will do, and whether it can: found out before any training."""

import os
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SAE_CFG_FILENAME

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.checkpoints import (
    check_resumable,
    is_checkpoint,
)
from sae_lens_atm.training.preflight.lookups import look_up
from sae_lens_atm.training.ranks import check_shares
from sae_lens_atm.training.ranks import size as number_of_processes
from sae_lens_atm.training.run_file import LanguageModelRun, Run, shown


def check_run(run: Run, checkpoint: Path | None = None, dry: bool = False) -> dict[str, Any]:
    """Check what can be checked without loading data or models, and say what would be done.

    For a `dry` run everything short of the download of a language model is checked (`dry_run`).

    Raises:
        SettingsError, CheckpointError: something does not fit.
    """
    cfg = run.runner
    output = check_output(run, checkpoint)
    facts: dict[str, Any] = {"architecture": cfg.sae.architecture()}
    if isinstance(run, LanguageModelRun):
        facts |= {
            "model": f"{run.runner.model_name} at {run.runner.hook_name}",
            "dataset": run.runner.dataset_path or "(none)",
        }
        check_data(run)
        batch = run.runner.train_batch_size_tokens
    else:
        batch = run.runner.batch_size
    check_shares(run)
    parameters = cfg.sae.d_sae * (2 * cfg.sae.d_in + 1) + cfg.sae.d_in
    facts |= {
        "d_in, d_sae": f"{cfg.sae.d_in}, {cfg.sae.d_sae} ({parameters:,} parameters)",
        "steps": f"{cfg.total_training_steps:,} of {batch:,}",
        # weights, gradients and the two moments of Adam
        "memory": f"{16 * parameters / 2**30:.2f} GiB for the SAE in float32, activations aside",
        "output": output,
    }
    if number_of_processes() > 1:
        share = batch // number_of_processes()
        facts["processes"] = f"{number_of_processes()}, with {share:,} of each batch"
    if checkpoint is not None:
        check_resumable(checkpoint, run)
        facts["resuming from"] = checkpoint
    if dry and isinstance(run, LanguageModelRun):
        facts |= look_up(run.runner)
    return facts


def check_data(run: LanguageModelRun) -> None:
    """Check what SAELens would stumble on when it has loaded the model.

    Raises:
        SettingsError: there is no dataset, or the activation buffer is less than a batch.
    """
    cfg = run.runner
    if cfg.use_cached_activations:
        return
    if not cfg.dataset_path:
        raise SettingsError("dataset_path: missing, a language-model run needs a dataset")
    buffer = cfg.n_batches_in_buffer * cfg.context_size
    if buffer < cfg.train_batch_size_tokens:
        raise SettingsError(
            f"n_batches_in_buffer is {cfg.n_batches_in_buffer}: times context_size "
            f"{cfg.context_size} it must reach train_batch_size_tokens, "
            f"{cfg.train_batch_size_tokens}"
        )


def check_devices(run: Run) -> None:
    """A dry run may be made elsewhere than the run, so it does not look at the machine."""
    cfg = run.runner
    devices = {"device": cfg.device, "sae.device": cfg.sae.device}
    if isinstance(run, LanguageModelRun):
        devices |= {"llm_device": run.runner.llm_device or ""}
    for name, device in devices.items():
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise SettingsError(f"{name} is {device!r}: this machine has no CUDA device")


def check_output(run: Run, resume: str | Path | None = None) -> Path:
    """The run's folder, checked: writable, and without anything that would be lost.

    Raises:
        SettingsError: naming the folder and what to do.
    """
    output = Path(run.runner.output_path or "")
    checkpoints = Path(run.runner.checkpoint_path or "")
    for folder in (output, checkpoints):
        try:
            existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        except (OSError, ValueError) as error:  # no path at all: too long, or with a 0 in it
            raise SettingsError(f"output_path {shown(str(folder))}: {error.args[-1]}") from error
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise SettingsError(f"output_path {folder} is not writable: see {existing}")
    if (output / SAE_CFG_FILENAME).exists():
        raise SettingsError(
            f"output_path {output} already holds a finished SAE: choose another folder"
        )
    if resume is None and any(is_checkpoint(folder) for folder in checkpoints.glob("*")):
        raise SettingsError(
            f"{checkpoints} holds checkpoints of an unfinished run: go on with "
            f"--resume {checkpoints}, or choose another output_path"
        )
    return output
