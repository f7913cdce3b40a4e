"""What several baselines share: checks of settings, a count of steps."""

from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from sae_lens_atm.method.buffers import ExactBuffers


def require(cfg: Any, name: str, holds: bool, allowed: str) -> None:
    """Raise a `ValueError` about a field of a configuration unless its value is allowed."""
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {getattr(cfg, name)!r}")


def require_one_scale(cfg: Any, or_whitening: bool = False) -> None:
    """Raise a `ValueError` unless all inputs are scaled by one factor, or not at all.

    Args:
        cfg: the configuration.
        or_whitening: allow one linear map of all inputs, too.
    """
    supported = ("none", "expected_average_only_in")
    if or_whitening:
        supported += ("covariance_whitening",)
    is_supported = cfg.normalize_activations in supported
    require(cfg, "normalize_activations", is_supported, f"one of {', '.join(supported)}")


class CountsSteps(ExactBuffers):
    """Counts training steps in a buffer, which checkpoints hold and saved SAEs do not.

    It comes before SAELens' class in the bases. SAELens' own count is wrong after some resumes.
    """

    steps: Tensor
    exact_buffers = ("steps",)

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=cfg.device))

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output: TrainStepOutput = super().training_forward_pass(step_input)  # pyright: ignore
        self.steps += 1
        return output

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)  # pyright: ignore
        state_dict.pop("steps")
