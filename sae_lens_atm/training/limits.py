"""Limits of the settings of a run. SAELens' configurations accept any value of the right type."""

import math
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, TrainingSAE
from sae_lens.util import DTYPE_MAP

from sae_lens_atm.errors import SettingsError, one_line, shown
from sae_lens_atm.sae.config import ATMTrainingSAEConfig
from sae_lens_atm.training.schema import did_you_mean

_CHOICES = {
    "lr_scheduler_name": ("constant", "cosineannealing", "cosineannealingwarmrestarts"),
    "dtype": tuple(DTYPE_MAP),  # of the activations of a language model
}
_DEVICES = ("device", "llm_device", "act_store_device", "sae.device")
_Limit = tuple[float, float, str]

_MOST = 2**53
_COUNT: _Limit = (1, _MOST, "1 or more, and at most 2**53")
_COUNT_OR_0: _Limit = (0, _MOST, "0 or more, and at most 2**53")
_COEFFICIENT: _Limit = (0, 1e6, "0 or more, and at most 1e6")
_ABOVE_0: _Limit = (math.nextafter(0, 1), math.inf, "above 0")
_NOT_NEGATIVE: _Limit = (0, math.inf, "0 or more")
_SHARE: _Limit = (0, 1, "in [0, 1]")
_DECAY: _Limit = (0, math.nextafter(1, 0), "in [0, 1)")
_SEED: _Limit = (0, 2**31 - 1, "a whole number from 0 to 2**31 - 1")
_WIDTH: _Limit = (1, 2**28, "1 or more, and at most 2**28")

_LIMITS: dict[str, _Limit] = {
    "seed": _SEED,
    "max_bad_batches": _COUNT,
    # the length of the run
    "training_samples": _COUNT,
    "training_tokens": _COUNT,
    "batch_size": _COUNT,
    "train_batch_size_tokens": _COUNT,
    # the optimizer
    "lr": _ABOVE_0,
    "lr_end": _NOT_NEGATIVE,
    "lr_warm_up_steps": _COUNT_OR_0,
    "lr_decay_steps": _COUNT_OR_0,
    "n_restart_cycles": _COUNT,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    # data
    "store_batch_size_prompts": _COUNT,
    "n_batches_in_buffer": _COUNT,
    "context_size": (1, 2**24, "1 or more, and at most 2**24"),
    "activations_mixing_fraction": _SHARE,
    "n_batches_for_norm_estimate": _COUNT,
    # counters, checkpoints, evaluation
    "feature_sampling_window": _COUNT,
    "dead_feature_window": _COUNT,
    "n_checkpoints": (0, 10_000, "0 or more, and at most 10,000"),
    "eval_frequency": _COUNT_OR_0,
    "eval_samples": _COUNT_OR_0,
    "n_eval_batches": _COUNT_OR_0,
    "eval_batch_size_prompts": _COUNT,
    "logger.wandb_log_frequency": _COUNT,
    "logger.eval_every_n_wandb_logs": _COUNT,
    # the SAE, of any architecture
    "sae.d_in": _WIDTH,
    "sae.d_sae": _WIDTH,
    "sae.decoder_init_norm": (1e-6, 1e3, "from 1e-6 to 1000"),
    "sae.aux_loss_coefficient": _COEFFICIENT,
    "sae.l0_coefficient": _COEFFICIENT,
    "sae.l1_coefficient": _COEFFICIENT,
    "sae.pre_act_loss_coefficient": _COEFFICIENT,
    "sae.l0_warm_up_steps": _COUNT_OR_0,
    "sae.l1_warm_up_steps": _COUNT_OR_0,
    "sae.lp_norm": (1e-12, math.inf, "above 0"),
    "sae.jumprelu_bandwidth": (1e-12, 1e6, "above 0, and at most 1e6"),
    "sae.jumprelu_init_threshold": (1e-12, 1e6, "above 0, and at most 1e6"),
    "sae.target_l0": _ABOVE_0,
    "sae.max_iterations": _COUNT,
    "sae.residual_threshold": _NOT_NEGATIVE,
    "sae.topk_threshold_lr": _SHARE,
    # SAELens' synthetic model
    "synthetic_model.num_features": (1, 2**20, "1 or more, and at most 2**20"),
    "synthetic_model.hidden_dim": _WIDTH,
    "synthetic_model.seed": _SEED,
}


def check_limits(values: dict[str, Any]) -> None:
    """Check each value of a run file against its own limits.

    Args:
        values: the run file, with the types of its schema.

    Raises:
        SettingsError: one line for each mistake.
    """
    found = [_limit_broken(name, _value(values, name), limit) for name, limit in _LIMITS.items()]
    found += [_device_broken(name, _value(values, name)) for name in _DEVICES]
    found.append(
        _slice_broken(
            values.get("seqpos_slice"),
            values.get("context_size", LanguageModelSAERunnerConfig.context_size),
        )
    )
    found += [_choice_broken(name, values.get(name), allowed) for name, allowed in _CHOICES.items()]
    lines = [line for line in found if line]
    if lines:
        raise SettingsError("\n".join(lines))


def _value(values: dict[str, Any], name: str) -> Any:
    value: Any = values
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _limit_broken(name: str, value: Any, limit: _Limit) -> str:
    low, high, allowed = limit
    is_inside = not isinstance(value, int | float) or low <= value <= high
    return "" if is_inside else f"{name} must be {allowed}, got {shown(value)}"


def _slice_broken(positions: list[int | None] | None, context: int) -> str:
    try:
        is_empty = positions is not None and not len(range(context)[slice(*positions)])
    except (TypeError, ValueError):  # too many numbers, or a step of 0
        is_empty = True
    return (
        f"seqpos_slice must leave a position of context_size = {context}, got {positions}"
        if is_empty
        else ""
    )


def _choice_broken(name: str, value: str | None, allowed: tuple[str, ...]) -> str:
    if value is None or value in allowed:
        return ""
    near = did_you_mean(value, allowed)
    return f"{name} must be one of {', '.join(allowed)}, got {value!r}{near}"


def _device_broken(name: str, value: str | None) -> str:
    try:
        is_usable = value is None or torch.device(value).type != "meta"
    except RuntimeError:
        is_usable = False
    return "" if is_usable else f"{name} must be a device of torch, got {value!r}"


def check_sae(cfg: Any) -> None:
    """Check what the classes of other architectures check only when an SAE is made, or never.

    Args:
        cfg: the training config of an SAE.

    Raises:
        SettingsError: no SAE can be made, or no step can be taken.
    """
    k: float | None = getattr(cfg, "k", None)
    # ATM's config has checked its own k, which some of its activations ignore.
    if k is not None and not isinstance(cfg, ATMTrainingSAEConfig) and not 0 < k <= cfg.d_sae:
        raise SettingsError(
            f"sae.k must be above 0 and at most sae.d_sae = {cfg.d_sae}, got {shown(k)}"
        )
    try:
        TrainingSAE[Any].from_dict({**cfg.to_dict(), "device": "meta"})
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise SettingsError(f"sae: {one_line(error)}") from error


def check_schedule(cfg: Any) -> None:
    """Check the settings that must fit the number of steps of a run.

    Args:
        cfg: the config of SAELens' runner, complete with its defaults.

    Raises:
        SettingsError: the run has no step, or fewer than its schedules need.
    """
    samples, batch = "training_samples", "batch_size"
    if isinstance(cfg, LanguageModelSAERunnerConfig):
        samples, batch = "training_tokens", "train_batch_size_tokens"
    if getattr(cfg, samples) < getattr(cfg, batch):
        raise SettingsError(
            f"{samples} must be at least {batch} = {getattr(cfg, batch)}, which is one step, "
            f"got {getattr(cfg, samples)}"
        )
    steps: int = cfg.total_training_steps
    ramps: int = cfg.lr_warm_up_steps + cfg.lr_decay_steps
    scheduler, is_constant = cfg.lr_scheduler_name, cfg.lr_scheduler_name == "constant"
    most = steps if is_constant else steps - 1
    if ramps > most:
        raise SettingsError(
            f"lr_warm_up_steps + lr_decay_steps must be at most {most}, as the run has {steps} "
            f"steps ({samples} // {batch}), got {cfg.lr_warm_up_steps} + {cfg.lr_decay_steps}"
        )
    if scheduler == "cosineannealingwarmrestarts" and cfg.n_restart_cycles > steps - ramps:
        raise SettingsError(
            f"n_restart_cycles must be at most {steps - ramps}, the steps between warm-up and "
            f"decay, got {cfg.n_restart_cycles}"
        )
    lr_end: float = cfg.lr_end or 0.0
    if not is_constant and cfg.lr_decay_steps and not 0 < lr_end / cfg.lr <= 1:
        raise SettingsError(
            f"lr_end must be above 0 and at most lr = {cfg.lr} with lr_decay_steps, got {lr_end}"
        )
    if cfg.n_checkpoints > steps:
        raise SettingsError(
            f"n_checkpoints must be at most {steps}, the steps of the run, got {cfg.n_checkpoints}"
        )
