"""Checkpoints of a run: find the newest, and check it before use. `checkpointer` writes them.

A checkpoint has SAELens' own files (`SAETrainer.save_checkpoint`), the configuration of the run,
the state of torch's random numbers, and a manifest with checksums.
"""

import copy
import json
import math
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from sae_lens import JumpReLUTrainingSAEConfig, TrainingSAEConfig
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from safetensors import safe_open

from sae_lens_atm.data.random_state import RANDOM_STATE_FILENAME
from sae_lens_atm.errors import CheckpointError, SettingsError, shown, with_type
from sae_lens_atm.files import manifest_mismatch, read_json, read_manifest, restore_replaced
from sae_lens_atm.sae.removed import drop_removed
from sae_lens_atm.training.run_file import Run, SyntheticRun, batch_size_of

MAY_CHANGE_ON_RESUME = (
    *("output_path", "checkpoint_path", "resume_from_checkpoint", "logger", "verbose"),
    *("device", "llm_device", "act_store_device", "prefetch_llm_batches"),
    *("compile_llm", "llm_compilation_mode", "compile_sae", "sae_compilation_mode"),
    *("n_checkpoints", "save_final_checkpoint", "save_synthetic_model", "run_final_eval"),
    *("eval_samples", "eval_frequency", "n_eval_batches", "eval_batch_size_prompts"),
)
"""Settings of a run that may differ between a checkpoint and the run that resumes from it.

They are where the run is stored and computed, what is logged, saved and evaluated.
`max_bad_batches` may change, too. All other settings must be equal.
"""
ESTIMATED_SCALES = ("expected_average_only_in", "covariance_whitening")
"""Values of normalize_activations for which SAELens estimates a scale before training."""
CHANGED_BY_FOLDING = ("normalize_activations", "rescale_acts_by_decoder_norm")
"""Fields of the SAE that SAELens changes when it folds the scale into the weights, at the end."""
# ATM's config had these fields in 0.1. Only activation "jumprelu", which was removed, used them.
_UNUSED_IN_0_1 = {field.name for field in fields(JumpReLUTrainingSAEConfig)}
_REQUIRED = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, TRAINER_STATE_FILENAME)


def run_config(run: Run) -> dict[str, Any]:
    """Return the configuration of a run as plain values: SAELens' fields, seed and hierarchy."""
    config: dict[str, Any] = {}
    if isinstance(run, SyntheticRun) and run.hierarchy is not None:
        config["hierarchy_model"] = asdict(run.hierarchy)  # SAELens' config lacks its options
    return {**config, **run.runner.to_dict(), "seed": run.seed}


# --- finding -------------------------------------------------------------------------------------


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder has the files and file sizes of a complete checkpoint."""
    return not folder.name.startswith(".") and _problem(folder, checksums=False) is None


def _problem(folder: Path, checksums: bool) -> str | None:
    for name in _REQUIRED:
        if not (folder / name).is_file():
            return f"{name} is missing"
    return manifest_mismatch(folder, checksums)


def newest_checkpoint(path: str | Path, run: Run | None = None) -> Path:
    """Return the checkpoint at a path: the path itself, or the newest one in a run's folder.

    Every file is read and compared with its checksum. In a run's folder, newer checkpoints that are
    damaged are skipped with a warning.

    Args:
        path: the path.
        run: skip checkpoints in a run's folder that this run cannot extend.

    Raises:
        CheckpointError: there is no checkpoint, or the path is a damaged one.
    """
    folder = Path(path)
    if not folder.name.startswith(".") and (samples_of(folder) >= 0 or is_checkpoint(folder)):
        problem = _problem(folder, checksums=True)
        if problem is None:
            return folder
        if any((folder / name).exists() for name in _REQUIRED):
            raise CheckpointError(f"cannot resume: {folder} is damaged ({problem})")
    candidates: list[Path] = []
    for base in (folder, folder / "checkpoints"):
        if base.is_dir():
            restore_replaced(base)
            candidates += [f for f in base.iterdir() if samples_of(f) >= 0 or is_checkpoint(f)]
    for candidate in sorted(candidates, key=samples_of, reverse=True):
        problem = _problem(candidate, checksums=True)
        if candidate.name.startswith("."):
            problem = "it is incomplete, the run ended while writing it"
        if problem is None and (run is None or can_extend(candidate, run)):
            return candidate
        if problem is None:
            continue
        warnings.warn(f"skipped the damaged checkpoint {candidate}: {problem}", stacklevel=2)
    what = "complete checkpoint" if run is None else "complete checkpoint before lr decays"
    if not folder.exists():
        raise CheckpointError(f"cannot resume: {folder} does not exist")
    finished = "a finished SAE, and " if (folder / SAE_CFG_FILENAME).exists() else ""
    raise CheckpointError(
        f"cannot resume: {folder} holds {finished}no {what}. Runs write some with n_checkpoints or "
        "save_final_checkpoint"
    )


def any_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in a folder, or None. Damaged ones are passed over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return newest_checkpoint(folder)
        except CheckpointError:
            return None


def samples_of(checkpoint: Path) -> int:
    """Return the number of samples in the name of a checkpoint (`1024`, `final_2048`).

    Returns -1 for other folders. Incomplete checkpoints (`.1024.partial`) count.
    """
    name = checkpoint.name.removeprefix(".").removesuffix(".partial")
    number = name.removeprefix("final_")
    return int(number) if number.isascii() and number.isdigit() else -1


def skipped_batches(checkpoint: Path) -> int:
    """Return how many bad batches the run had skipped."""
    with reading(checkpoint):
        return int((read_manifest(checkpoint) or {}).get("skipped_batches", 0))


# --- checking ------------------------------------------------------------------------------------


@contextmanager
def reading(folder: Path) -> Generator[None]:
    """Turn any error while a checkpoint is read into a CheckpointError that names the folder."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = with_type(error)
        raise CheckpointError(f"cannot resume: {folder} is damaged ({reason})") from error


def check_resumable(folder: Path, run: Run, extend: int = 0) -> None:
    """Check that a run can resume from a checkpoint, before models and data are loaded.

    Nothing in the checkpoint is executed. SAELens and older versions of torch would execute its
    pickles; here they are read as plain data or refused.

    Args:
        folder: a checkpoint whose files match its manifest, see `newest_checkpoint`.
        run: the run that resumes. It may differ in `MAY_CHANGE_ON_RESUME` only.
        extend: number of samples by which it is longer, see `extended`.

    Raises:
        CheckpointError: the checkpoint belongs to another run, or is damaged.
    """
    cfg = run.runner.sae
    with reading(folder):
        saved = json.loads((folder / SAE_CFG_FILENAME).read_text(encoding="utf-8"))
        stored_run = read_json(folder / RUNNER_CFG_FILENAME)  # checkpoints of 0.1 may lack it
        architecture = saved.get("architecture")
    if architecture == "atm":
        try:
            saved = drop_removed(saved)
        except ValueError as error:
            raise CheckpointError(f"cannot resume {folder}: {error}") from error
        known = cfg.to_dict().keys()
        saved = {k: v for k, v in saved.items() if k in known or k not in _UNUSED_IN_0_1}
    ignored = ["metadata", "device"]
    if folder.name.startswith("final_") and cfg.normalize_activations in ESTIMATED_SCALES:
        ignored += CHANGED_BY_FOLDING
    _compare(folder, _comparable(cfg), saved, ignored)
    for key in saved.keys() - cfg.to_dict().keys():
        raise CheckpointError(
            f"cannot resume: {folder} has {key} = {saved[key]!r}, a setting that this version of "
            f"{architecture!r} does not have"
        )
    with reading(folder):
        _compare_run(folder, run, stored_run, extend)
    if not can_extend(folder, run):
        raise CheckpointError(
            f"cannot extend {folder}: lr has decayed there, or the scale of the activations is "
            "folded into its weights. Resume from an earlier checkpoint"
        )
    with reading(folder):
        with safe_open(folder / SAE_WEIGHTS_FILENAME, framework="pt") as tensors:
            shape = tuple(tensors.get_slice("W_dec").get_shape())
            broken = [n for n in tensors.keys() if is_broken(n, tensors.get_tensor(n))]  # noqa: SIM118
        state = check_pickles(folder)
        samples, steps = int(state["n_training_samples"]), int(state["n_training_steps"])
        scaler = json.loads((folder / ACTIVATION_SCALER_CFG_FILENAME).read_text(encoding="utf-8"))
        if not math.isfinite(scaler["scaling_factor"] or 1.0):
            raise ValueError(f"scaling_factor is {scaler['scaling_factor']}")
    if shape != (cfg.d_sae, cfg.d_in):
        raise CheckpointError(
            f"cannot resume: W_dec in {folder} has shape {shape}, expected {(cfg.d_sae, cfg.d_in)}"
        )
    for name in broken:
        raise CheckpointError(f"cannot resume: {name} in {folder} holds NaN or Inf values")
    # A periodic checkpoint is written before its last step is counted.
    batch = run.runner.to_sae_trainer_config().train_batch_size_samples
    if samples % batch or samples // batch - steps not in (0, 1):
        raise CheckpointError(
            f"cannot resume: the batch size is {batch} in this run, but {folder} has {samples} "
            f"samples in {steps} steps"
        )


def check_finished(folder: Path, run: Run, extend: int = 0) -> bool:
    """Return whether a finished run is as long as this one, after checking that they are equal.

    Args:
        folder: the folder of the finished run.
        run: this run, in the same place.
        extend: number of samples by which it is longer, see `extended`.

    Raises:
        CheckpointError: the runs differ.
    """
    with reading(folder):
        stored = read_json(folder / RUNNER_CFG_FILENAME)
        trained = int(stored.get(length_setting(run), 0))
        cfg, saved = _comparable(run.runner.sae), stored.get("sae", {})
        _compare(folder, cfg, saved, ["metadata", "device", *CHANGED_BY_FOLDING])
        _compare_run(folder, run, stored, extend, longer=True)
    return trained >= getattr(run.runner, length_setting(run))


def length_setting(run: Run) -> str:
    """Return the name of the setting with the length of a run."""
    return "training_samples" if isinstance(run, SyntheticRun) else "training_tokens"


def extended(run: Run, samples: int) -> Run:
    """Return the run with more samples (tokens of a language model).

    The decay of lr moves to the new end. All fields of the SAE stay, `schedule_steps` too.

    Raises:
        SettingsError: the whole schedule of lr depends on the length of the run.
    """
    if samples and run.runner.lr_scheduler_name != "constant":
        raise SettingsError(
            "lr_scheduler_name must be 'constant' for a run that is extended, got "
            f"{run.runner.lr_scheduler_name!r}"
        )
    name, result = length_setting(run), replace(run, runner=copy.copy(run.runner))
    setattr(result.runner, name, getattr(run.runner, name) + samples)
    return result


def can_extend(folder: Path, run: Run) -> bool:
    """Return whether a checkpoint is of this run, or of a shorter one before its lr decayed."""
    cfg = run.runner
    with reading(folder):
        length = read_json(folder / RUNNER_CFG_FILENAME).get(length_setting(run))
    wanted = getattr(cfg, length_setting(run))
    if not isinstance(length, int) or length >= wanted:
        return True
    is_folded = folder.name.startswith("final_") and cfg.sae.normalize_activations in (
        ESTIMATED_SCALES
    )
    return not is_folded and samples_of(folder) <= length - cfg.lr_decay_steps * batch_size_of(run)


def _compare_run(
    folder: Path, run: Run, stored: dict[str, Any], extend: int, longer: bool = False
) -> None:
    """Check that a stored configuration is the run's, or that of the run before its extension."""
    config, name = json.loads(json.dumps(run_config(run))), length_setting(run)
    ignored = ["sae", *MAY_CHANGE_ON_RESUME]
    length = config[name]
    if length - extend <= stored.get(name, length) and (longer or stored.get(name, 0) <= length):
        ignored.append(name)
    elif extend:
        config[name] = length - extend
    _compare(folder, config, stored, ignored)


_BEFORE = {
    "parent_chance": 0.0,
    "aux_negative_slope": 0.0,
    "frequency_penalty": 0.0,
    "budget_weight": 0.0,
    "per_sample_end": 0.0,
}
"""Fields that older checkpoints of ATM lack, with values at which an SAE trains as it did then."""


def _compare(
    folder: Path, wanted: dict[str, Any], saved: dict[str, Any], ignored: list[str]
) -> None:
    saved = _BEFORE | saved if wanted.get("architecture") == "atm" else saved
    for key, value in wanted.items():
        # A setting that a newer version has added is not in the file.
        if key not in ignored and saved.get(key, value) != value:
            raise CheckpointError(
                f"cannot resume: {key} is {shown(value)} in this run and {shown(saved[key])} in "
                f"{folder}. Resume with the settings of the checkpoint, or train a new run"
            )


def _comparable(cfg: TrainingSAEConfig) -> dict[str, Any]:
    """Return a SAE's configuration as in cfg.json, with the fields that matter most first."""
    content = json.loads(json.dumps({**cfg.to_dict(), "metadata": None}))
    return {"architecture": content["architecture"], "d_in": cfg.d_in, "d_sae": cfg.d_sae} | content


def check_pickles(folder: Path) -> dict[str, Any]:
    """Read the files that SAELens unpickles as plain data, and return the trainer's state.

    Raises:
        Exception: of any kind, if a file holds anything else.
    """
    if (folder / RANDOM_STATE_FILENAME).exists():
        _check_random_state(_load_plain(folder / RANDOM_STATE_FILENAME))
    return _load_plain(folder / TRAINER_STATE_FILENAME)


def _check_random_state(state: Any) -> None:
    expected = torch.get_rng_state()
    states: list[Any] = []
    if isinstance(state, dict):
        content = cast(dict[str, Any], state)
        states = [content.get("cpu"), *content.get("cuda", [])]
    if not states or any(getattr(s, "dtype", None) != expected.dtype for s in states):
        raise ValueError(f"{RANDOM_STATE_FILENAME} holds no random state")
    if states[0].shape != expected.shape:
        raise ValueError(f"{RANDOM_STATE_FILENAME} holds the random state of another generator")


def _load_plain(path: Path) -> Any:
    try:
        # Mapped, not read: the optimizer's state is twice as large as the SAE.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:  # torch's message advises to execute the file
        raise ValueError(f"{path.name} holds other objects than tensors and numbers") from error


def is_broken(name: str, tensor: torch.Tensor) -> bool:
    """Return whether a tensor of an SAE has NaN or Inf values. A threshold may be infinite."""
    if not tensor.is_floating_point():
        return False
    finite = not tensor.isnan().any() if "threshold" in name else tensor.isfinite().all()
    return not finite
