"""The configuration of an ATM SAE, checked field by field when it is made."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sae_lens import (
    BatchTopKTrainingSAEConfig,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAEConfig,
    SAEConfig,
    StandardTrainingSAEConfig,
)
from sae_lens.constants import DTYPE_MAP
from typing_extensions import Self, override

from sae_lens_atm.method.importance import Combine

Activation = Literal["batchtopk", "jumprelu", "relu"]
Schedule = Literal["dual", "interleaved", "masked"]
Granularity = Literal["step", "sample"]
Course = Literal["uniform", "ramp"]
Draw = Literal["independent", "coherent"]
Choice = Literal["again", "inherited"]
Kernels = Literal["auto", "dense"]


@dataclass
class ATMTrainingSAEConfig(
    BatchTopKTrainingSAEConfig, JumpReLUTrainingSAEConfig, StandardTrainingSAEConfig
):
    """Configuration of an `ATMTrainingSAE`: a SAELens SAE trained under Adaptive Temporal Masking.

    The fields of SAELens' `batchtopk`, `jumprelu` and `standard` training configurations are
    inherited; those of the activation in use apply, the others are ignored.

    Args:
        activation: the activation under the mask, SAELens' own: "batchtopk" (field `k`),
            "jumprelu" (`l0_coefficient` and the `jumprelu_*` fields) or "relu" (`l1_coefficient`,
            `lp_norm`; the paper's "reconstruction error plus a sparsity penalty").
        schedule: what a training step minimises, with L the loss of the ordinary, full SAE and
            L' that of the masked one. "dual": (1 - w) L + w L'. "interleaved": L' with
            probability q, else L. "masked": L' (the paper's reading).
        masked_weight: w of the dual schedule, in [0, 1].
        masked_probability: q of the interleaved schedule, in [0, 1].
        mask_granularity: one mask for the whole batch ("step") or one per sample ("sample").
        mask_draw: each latent by a number of its own ("independent", the paper's), or all by one
            ("coherent"), so that latents fall in the order of their importance.
        masked_choice: under `batchtopk`, the masked view of the dual schedule chooses its k "again"
            among the kept latents, or has "inherited" from the full view what that chose of them.
        k_start: k at the first step as a multiple of `k`, to which it falls linearly by `mask_end`.
        importance_decay: decay of the moving averages of the three signals, in [0, 1).
        magnitude_weight: weight in the importance of M_i = |d_i| E[a_i].
        frequency_weight: weight in the importance of F_i = P(a_i > 0).
        contribution_weight: weight in the importance of R_i = E[2 a_i <d_i, e>] + |d_i|^2 E[a_i^2],
            the squared error that leaving latent i out would add.
        importance_combine: weighted arithmetic ("sum") or geometric ("geometric") mean of the
            signals, each divided by its mean over the latents.
        schedule_steps: the number of training steps, over which the schedule is laid out. An SAE
            is never told it: give yours. Run files fill it in.
        c_course: how c goes, in theta_t = mu_t + c * sigma_t: linearly from `c_start` at the first
            step to `c_end` at the end of masking ("ramp"), or drawn anew for each step, evenly
            between the two ("uniform").
        c_start: c at the first step.
        c_end: c at the end of masking.
        mask_end: share of `schedule_steps` after which nothing is masked any more, in [0, 1].
        mask_rate: r in p_i = 1 - exp(-r * (theta_t - Importance_i) / theta_t). 0 masks nothing.
        mask_warm_up_steps: steps at the start without masking, while the averages fill.
        mask_ramp_steps: steps after those over which p_i grows linearly to its full value.
        mask_seed: seed of the masks' random numbers, which depend on it and the step alone.
        parent_weight: weight of the pressure that keeps the decoder of a latent off those of the
            more important latents that it implies (ours, not the paper's; see `parents`). 0: none.
        parent_tau: how much of a latent's direction must be in the inputs on which another fires
            for the other to imply it, in (0, 1]; 1 is as much as where the latent itself fires.
        parent_start: share of `schedule_steps` at which that pressure begins, in [0, 1].
        parent_rows: latents whose parents are looked for in a step, in turn; bounds its cost.
        kernels: "auto" computes with activations that are not 0 alone where that is faster (see
            `sparse`), "dense" with all, as SAELens does. The results are the same up to rounding.
    """

    activation: Activation = "batchtopk"
    schedule: Schedule = "dual"
    masked_weight: float = 0.5
    masked_probability: float = 0.5
    mask_granularity: Granularity = "step"
    mask_draw: Draw = "independent"
    masked_choice: Choice = "again"
    k_start: float = 1.0
    importance_decay: float = 0.99
    magnitude_weight: float = 1.0
    frequency_weight: float = 1.0
    contribution_weight: float = 1.0
    importance_combine: Combine = "sum"
    c_course: Course = "ramp"
    c_start: float = 0.0
    c_end: float = 1.0
    schedule_steps: int = 10_000
    mask_end: float = 0.6
    mask_rate: float = 1.0
    mask_warm_up_steps: int = 100
    mask_ramp_steps: int = 0
    mask_seed: int = 0
    parent_weight: float = 1.0
    parent_tau: float = 0.45
    parent_start: float = 0.2
    parent_rows: int = 256
    kernels: Kernels = "auto"

    @override
    @classmethod
    def architecture(cls) -> str:
        return "atm"

    @classmethod
    def paper(cls, d_in: int, d_sae: int, **overrides: Any) -> Self:
        """The literal reading of the paper: ReLU, an L1 penalty, every step masked, nothing else.

        What the paper leaves open (see the README) keeps this project's defaults, but for c,
        which is constant. Any field can be overridden.
        """
        literal: dict[str, Any] = {
            "activation": "relu",
            "schedule": "masked",
            "c_end": 0.0,
            "mask_end": 1.0,
            "parent_weight": 0.0,
        }
        return cls(d_in=d_in, d_sae=d_sae, **{**literal, **overrides})

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig

    @property
    def signal_weights(self) -> tuple[float, float, float]:
        return (self.magnitude_weight, self.frequency_weight, self.contribution_weight)

    @property
    def mask_end_step(self) -> int:
        """The first step that masks nothing any more. If `mask_end` is 1 masking never ends."""
        return round(self.mask_end * self.schedule_steps)

    @property
    def parent_start_step(self) -> int:
        """The first step with pressure on the children."""
        return round(self.parent_start * self.schedule_steps)

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
        for name in _WHOLE:
            self._require(name, isinstance(getattr(self, name), int), "a whole number")
        self._require("importance_decay", self.importance_decay < 1, "in [0, 1)")
        self._require("k_start", self.k_start > 0, "above 0")
        self._require("parent_tau", self.parent_tau > 0, "in (0, 1]")
        if sum(self.signal_weights) == 0:
            raise ValueError(
                "magnitude_weight, frequency_weight and contribution_weight are all 0: "
                "allowed are weights of which at least one is above 0"
            )
        if self.activation == "batchtopk":
            self._require("k", _is_number(self.k), "a number")
            self._require("k", 0 < self.k <= self.d_sae, f"in (0, d_sae = {self.d_sae}]")
            # SAELens' auxiliary loss raises at the first dead latent, long into training.
            supported = ("none", "expected_average_only_in", "covariance_whitening")
            self._require(
                "normalize_activations",
                self.normalize_activations in supported,
                f"one of {', '.join(supported)} with activation='batchtopk'",
            )
        if self.activation == "jumprelu" and self.jumprelu_sparsity_loss_mode == "quadratic":
            self._require(
                "target_l0",
                _is_number(self.target_l0) and 0 < (self.target_l0 or 0) <= self.d_sae,
                f"in (0, d_sae = {self.d_sae}] with jumprelu_sparsity_loss_mode='quadratic'",
            )

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name} is {getattr(self, name)!r}: allowed is {allowed}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_CHOICES: dict[str, tuple[str, ...]] = {
    "activation": get_args(Activation),
    "schedule": get_args(Schedule),
    "mask_granularity": get_args(Granularity),
    "mask_draw": get_args(Draw),
    "masked_choice": get_args(Choice),
    "c_course": get_args(Course),
    "importance_combine": get_args(Combine),
    "kernels": get_args(Kernels),
    "jumprelu_sparsity_loss_mode": ("step", "tanh", "quadratic"),
    "dtype": tuple(DTYPE_MAP),
}
_INF = math.inf
_UNIT = (0, 1, "in [0, 1]")
_NOT_NEGATIVE = (0, _INF, "0 or more, and finite")
_STEPS = (0, 2**53, "a whole number, 0 or more")
_RANGES: dict[str, tuple[float, float, str]] = {
    "d_in": (1, _INF, "1 or more"),
    "d_sae": (1, _INF, "1 or more"),
    "masked_weight": _UNIT,
    "masked_probability": _UNIT,
    "k_start": (0, _INF, "above 0"),
    "importance_decay": (0, 1, "in [0, 1)"),
    "magnitude_weight": _NOT_NEGATIVE,
    "frequency_weight": _NOT_NEGATIVE,
    "contribution_weight": _NOT_NEGATIVE,
    "c_start": (-_INF, _INF, "any finite number"),
    "c_end": (-_INF, _INF, "any finite number"),
    "mask_rate": _NOT_NEGATIVE,
    "schedule_steps": _STEPS,
    "mask_end": _UNIT,
    "mask_warm_up_steps": _STEPS,
    "mask_ramp_steps": _STEPS,
    "mask_seed": (-_INF, _INF, "a whole number"),
    "parent_weight": _NOT_NEGATIVE,
    "parent_tau": (0, 1, "in (0, 1]"),
    "parent_start": _UNIT,
    "parent_rows": (1, _INF, "a whole number, 1 or more"),
    "topk_threshold_lr": _UNIT,
    "aux_loss_coefficient": _NOT_NEGATIVE,
    "l0_coefficient": _NOT_NEGATIVE,
    "l1_coefficient": _NOT_NEGATIVE,
    "jumprelu_bandwidth": (1e-12, _INF, "above 0"),
    "jumprelu_init_threshold": _NOT_NEGATIVE,
    "lp_norm": (1e-12, _INF, "above 0"),
    "l0_warm_up_steps": _NOT_NEGATIVE,
    "l1_warm_up_steps": _NOT_NEGATIVE,
}
_WHOLE = (
    "d_in",
    "d_sae",
    "schedule_steps",
    "mask_warm_up_steps",
    "mask_ramp_steps",
    "mask_seed",
    "parent_rows",
)


@dataclass
class ATMSAEConfig(JumpReLUSAEConfig):
    """Configuration of an `ATMSAE`, for inference.

    How it was trained is in `metadata.training_architecture_details`.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "atm"
