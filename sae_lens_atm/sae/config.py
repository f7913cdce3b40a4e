"""The configuration of an ATM SAE. Its fields are validated when it is made."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAEConfig,
    SAEConfig,
    StandardTrainingSAEConfig,
)
from sae_lens.constants import DTYPE_MAP
from typing_extensions import Self, override

from sae_lens_atm.sae.removed import drop_removed

Activation = Literal["batchtopk", "relu"]
Kernels = Literal["auto", "dense"]


@dataclass
class ATMTrainingSAEConfig(BatchTopKTrainingSAEConfig, StandardTrainingSAEConfig):
    """Configuration of an `ATMTrainingSAE`: an SAE trained with Adaptive Temporal Masking.

    The fields of SAELens' `batchtopk` and `standard` training configurations are inherited. Fields
    that only the other activation uses are ignored.

    Args:
        activation: the activation function, SAELens' own. "batchtopk" uses the field `k`. "relu"
            uses `l1_coefficient` and `lp_norm` (the paper's "sparsity penalty").
        masked_weight: w in the loss (1 - w) L_full + w L_masked, in [0, 1]. At 1, the paper's
            reading, the averages are also measured in the masked pass.
        importance_decay: decay of the moving averages of the three signals, in [0, 1).
        magnitude_weight: weight in the importance of M_i = |d_i| E[a_i].
        frequency_weight: weight in the importance of F_i = P(a_i > 0).
        contribution_weight: weight in the importance of R_i = E[2 a_i <d_i, e>] + |d_i|^2 E[a_i^2],
            the increase of the squared error without latent i.
        schedule_steps: number of training steps. Run files set it automatically; set it yourself
            in Python.
        c_start: c in theta_t = mu_t + c * sigma_t at the first step.
        c_end: c at the end of masking. It changes linearly from `c_start`.
        mask_end: share of `schedule_steps` after which nothing is masked, in [0, 1]. At 1 masking
            does not end.
        mask_rate: r in p_i = 1 - exp(-r * (theta_t - Importance_i) / theta_t). At 0 nothing is
            masked.
        mask_warm_up_steps: steps at the start without masking, while the averages fill.
        mask_seed: seed of the masks. Their random numbers depend only on it and the step.
        parent_weight: weight of the loss that keeps the directions of a latent's parents out of
            its decoder row (ours, not the paper's; see `method.parents`). At 0 it is off.
        parent_tau: tau in the rule for parents, in (0, 1]. Latent i is a parent of latent j if
            L_ji >= tau L_ii (see `method.parents.lift`).
        parent_chance: L_ji must also be at least `parent_chance` times the root mean square of the
            lifts that j has by chance (see `method.parents.implied_parents`). 0 turns this off.
        parent_start: share of `schedule_steps` at which that loss begins, in [0, 1].
        parent_rows: number of latents whose parents are searched in a step. The latents take
            turns, which bounds the cost of the search.
        aux_negative_slope: SAELens' auxiliary loss multiplies the pre-activations of a dead latent
            by this number if all of them in the batch are negative, in [0, 1] (ours). Other
            negative pre-activations count as 0.
        frequency_penalty: weight of a loss on activations that is larger for frequent latents
            (ours, see `method.sparsity`). At 0 it is off.
        frequency_penalty_end: share of `schedule_steps` after which that loss ends, in [0, 1].
        budget_weight: weight of a loss on smaller budgets (ours, see `method.budgets`), in [0, 1].
            It needs activation "batchtopk". At 0 it is off. While masks are active it is
            multiplied by ``1 - masked_weight``. On a language model try 1, with `parent_weight` 0
            and `mask_rate` 0.
        budget_end: share of `schedule_steps` after which that loss ends, in [0, 1].
        per_sample_end: share of `schedule_steps` until which each sample keeps its own k largest
            activations, in [0, 1) (ours). After it the batch keeps the largest, k per sample on
            average. It needs activation "batchtopk". At 0 it is off.
        kernels: "auto" uses sparse products where they are faster (see `method.sparse`), "dense"
            always dense ones, as SAELens does. The results are equal up to rounding.
    """

    activation: Activation = "batchtopk"
    masked_weight: float = 0.5
    importance_decay: float = 0.99
    magnitude_weight: float = 1.0
    frequency_weight: float = 1.0
    contribution_weight: float = 1.0
    c_start: float = 0.0
    c_end: float = 1.0
    schedule_steps: int = 10_000
    mask_end: float = 0.6
    mask_rate: float = 1.0
    mask_warm_up_steps: int = 100
    mask_seed: int = 0
    parent_weight: float = 1.0
    parent_tau: float = 0.45
    parent_chance: float = 3.0
    parent_start: float = 0.2
    parent_rows: int = 256
    aux_negative_slope: float = 0.1
    frequency_penalty: float = 0.0
    frequency_penalty_end: float = 0.6
    budget_weight: float = 0.0
    budget_end: float = 0.6
    per_sample_end: float = 0.0
    kernels: Kernels = "auto"

    @override
    @classmethod
    def architecture(cls) -> str:
        return "atm"

    @classmethod
    def paper(cls, d_in: int, d_sae: int, **overrides: Any) -> Self:
        """Return the literal reading of the paper: ReLU, an L1 penalty, only the masked loss.

        ``c`` is constant and masking does not end. Everything else that the paper leaves open has
        this project's defaults. Any field can be overridden.
        """
        literal: dict[str, Any] = {
            "activation": "relu",
            "masked_weight": 1.0,
            "c_end": 0.0,
            "mask_end": 1.0,
            "parent_weight": 0.0,
            "frequency_penalty": 0.0,
            "budget_weight": 0.0,
            "per_sample_end": 0.0,
        }
        return cls(d_in=d_in, d_sae=d_sae, **{**literal, **overrides})

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Self:
        """Make the configuration from a dictionary.

        Version 0.1 inherited the fields of SAELens' JumpReLU configuration. They are ignored.

        Raises:
            ValueError: a field is unknown, or was removed (see `sae.removed`).
        """
        values = drop_removed(config_dict)
        known = {f.name for config in (cls, JumpReLUTrainingSAEConfig) for f in fields(config)}
        unknown = sorted(values.keys() - known - _NOT_FIELDS)
        if unknown:
            raise ValueError(f"{unknown[0]}: unknown field of the configuration of an ATM SAE")
        return super().from_dict(values)

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig

    @property
    def signal_weights(self) -> tuple[float, float, float]:
        return (self.magnitude_weight, self.frequency_weight, self.contribution_weight)

    @property
    def mask_end_step(self) -> int:
        """The first step without masking. If `mask_end` is 1 masking does not end."""
        return round(self.mask_end * self.schedule_steps)

    @property
    def parent_start_step(self) -> int:
        """The first step with the loss on children (`parent_weight`)."""
        return round(self.parent_start * self.schedule_steps)

    @property
    def frequency_penalty_end_step(self) -> float:
        """The first step without the loss on frequent latents. At a share of 1 it does not end."""
        return self._end_step(self.frequency_penalty_end)

    @property
    def budget_end_step(self) -> float:
        """The first step without the loss on smaller budgets. At a share of 1 it does not end."""
        return self._end_step(self.budget_end)

    @property
    def per_sample_end_step(self) -> int:
        """The first step in which the batch, not each sample, keeps its largest activations."""
        return round(self.per_sample_end * self.schedule_steps)

    def _end_step(self, share: float) -> float:
        return round(share * self.schedule_steps) if share < 1 else math.inf

    @override
    def __post_init__(self) -> None:
        self._validate()
        super().__post_init__()

    def _validate(self) -> None:
        for name, choices in _CHOICES.items():
            self._require(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        for name, (low, high, allowed) in _RANGES.items():
            value = getattr(self, name)
            self._require(name, _is_number(value) and low <= value <= high, allowed)
        self._require("device", _is_device(self.device), "a device of torch")
        for name in _WHOLE:
            self._require(name, isinstance(getattr(self, name), int), "a whole number")
        for name in ("importance_decay", "per_sample_end"):
            self._require(name, getattr(self, name) < 1, "in [0, 1)")
        self._require("parent_tau", self.parent_tau > 0, "in (0, 1]")
        if sum(self.signal_weights) == 0:
            raise ValueError(
                "magnitude_weight, frequency_weight and contribution_weight are all 0: at least "
                "one must be above 0"
            )
        if self.activation != "batchtopk":
            allowed = "0 with activation='relu', which has no k"
            self._require("budget_weight", self.budget_weight == 0, allowed)
        else:
            self._require("k", _is_number(self.k), "a number")
            self._require("k", 0 < self.k <= self.d_sae, f"in (0, d_sae = {self.d_sae}]")
            # SAELens' auxiliary loss raises at the first dead latent, long into training.
            supported = ("none", "expected_average_only_in", "covariance_whitening")
            self._require(
                "normalize_activations",
                self.normalize_activations in supported,
                f"one of {', '.join(supported)} with activation='batchtopk'",
            )

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _is_device(value: str) -> bool:
    try:
        torch.device(value)
    except (RuntimeError, TypeError):
        return False
    return True


# What SAELens adds to the fields when it writes or reads a cfg.json.
_NOT_FIELDS = {"architecture", "finetuning_scaling_factor"}
_CHOICES: dict[str, tuple[str, ...]] = {
    "activation": get_args(Activation),
    "kernels": get_args(Kernels),
    "dtype": tuple(DTYPE_MAP),
}
_INF = math.inf
_UNIT = (0, 1, "in [0, 1]")
_NOT_NEGATIVE = (0, _INF, "0 or more, and finite")
_COEFFICIENT = (0, 1e6, "0 or more, and at most 1e6")
_WIDTH = (1, 2**28, "1 or more, and at most 2**28")
_STEPS = (0, 2**53, "a whole number, 0 or more")
_RANGES: dict[str, tuple[float, float, str]] = {
    "d_in": _WIDTH,
    "d_sae": _WIDTH,
    "masked_weight": _UNIT,
    "importance_decay": (0, 1, "in [0, 1)"),
    "magnitude_weight": _NOT_NEGATIVE,
    "frequency_weight": _NOT_NEGATIVE,
    "contribution_weight": _NOT_NEGATIVE,
    "c_start": (-_INF, _INF, "a finite number"),
    "c_end": (-_INF, _INF, "a finite number"),
    "mask_rate": _NOT_NEGATIVE,
    "schedule_steps": _STEPS,
    "mask_end": _UNIT,
    "mask_warm_up_steps": _STEPS,
    "mask_seed": (-_INF, _INF, "a whole number"),
    "parent_weight": _COEFFICIENT,
    "parent_tau": (0, 1, "in (0, 1]"),
    "parent_chance": _NOT_NEGATIVE,
    "parent_start": _UNIT,
    "parent_rows": (1, _INF, "a whole number, 1 or more"),
    "frequency_penalty": _COEFFICIENT,
    "frequency_penalty_end": _UNIT,
    "budget_weight": _UNIT,
    "budget_end": _UNIT,
    "per_sample_end": (0, 1, "in [0, 1)"),
    "topk_threshold_lr": _UNIT,
    "aux_loss_coefficient": _COEFFICIENT,
    "aux_negative_slope": _UNIT,
    "l1_coefficient": _COEFFICIENT,
    "lp_norm": (1e-12, _INF, "above 0"),
    "l1_warm_up_steps": _NOT_NEGATIVE,
}
_WHOLE = (
    "d_in",
    "d_sae",
    "schedule_steps",
    "mask_warm_up_steps",
    "mask_seed",
    "parent_rows",
)


@dataclass
class ATMSAEConfig(JumpReLUSAEConfig):
    """Configuration of an `ATMSAE`, for inference.

    `metadata.training_architecture_details` holds the training configuration.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "atm"
