"""Top-AFA: as many latents as it takes for the norm of the activations to reach that of the input.

Lee, Davies, Canby, Hockenmaier: *Evaluating and Designing Sparse Autoencoders by Approximating
Quasi-Orthogonality*, arXiv:2503.24277, with details from the authors' code
(github.com/SewoongLee/top-afa-sae). If the decoder rows are nearly orthogonal and of norm 1, then
|z| is close to |x - b_dec|. With the activations f = ReLU(W_enc (x - b_dec)) in falling order:

    k(x) = argmin_j | |(f_(1), ..., f_(j))| - |x - b_dec| |,    z = the k(x) largest of f
    L = |x - x_hat|^2 / d_in + lambda_AFA (|z| - |x|)^2 + alpha L_aux

There is no k to set, and no encoder bias. The method finds the L0, and comparisons leave it alone.
The code tries lambda_AFA of 1/128 to 1/16. On data with few active features this hardly changed the
L0, which stayed far above their number.

Open, and our choice:

- SAELens sums the squared error over d_in, so lambda_AFA is multiplied by d_in here.
- The code compares |z| with |x|, not with |x - b_dec|, in the loss. So does this file.
- The code standardises each input. Here one factor may scale them,
  `normalize_activations: expected_average_only_in`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from sae_lens import (
    SAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKTrainingSAE,
    TrainingSAEConfig,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.baselines.shared import require, require_one_scale

_FIRST_COUNT = 64  # of the largest activations that are sorted at first


@dataclass
class TopAFASAEConfig(StandardSAEConfig):
    """Configuration of a saved top-AFA SAE."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "top_afa"


@dataclass
class TopAFATrainingSAEConfig(TrainingSAEConfig):
    """Configuration of a top-AFA SAE.

    Args:
        afa_coefficient: lambda_AFA.
        aux_loss_coefficient: weight of SAELens' loss that revives dead latents.
        rescale_acts_by_decoder_norm: must be true: the norm of decoder rows counts as 1.
    """

    finds_l0: ClassVar[bool] = True
    decoder_init_norm: float | None = 1.0
    afa_coefficient: float = 1 / 32
    aux_loss_coefficient: float = 1 / 32
    rescale_acts_by_decoder_norm: bool = True

    @override
    @classmethod
    def architecture(cls) -> str:
        return "top_afa"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopAFASAEConfig

    @override
    def __post_init__(self) -> None:
        require(self, "afa_coefficient", 0 <= self.afa_coefficient <= 1e6, "from 0 to 1e6")
        require(self, "rescale_acts_by_decoder_norm", self.rescale_acts_by_decoder_norm, "true")
        require_one_scale(self)
        super().__post_init__()


def norm_matched(acts: Tensor, norm: Tensor, first: int = _FIRST_COUNT) -> tuple[Tensor, int]:
    """Keep the largest activations of each sample, so many that their norm is closest to `norm`.

    Args:
        acts: activations, 0 or more, ``(..., d_sae)``.
        norm: norm of each input, ``(...)``.
        first: number of activations of a sample to sort at first. It has no effect on the result.

    Returns:
        The activations; and the number that had to be sorted.
    """
    count, target = min(first, acts.shape[-1]), norm.unsqueeze(-1)
    wide = torch.promote_types(acts.dtype, torch.float32)  # squares overflow in float16
    while True:
        values, indices = acts.topk(count, dim=-1)
        norms = values.detach().to(wide).square().cumsum(-1).sqrt()
        is_enough = (norms[..., -1:] >= target) | (values[..., -1:] <= 0)
        if count == acts.shape[-1] or bool(is_enough.all()):
            break
        count = min(2 * count, acts.shape[-1])
    last = (norms - target).abs().argmin(-1, keepdim=True)
    kept = values * (torch.arange(count, device=acts.device) <= last)
    return torch.zeros_like(acts).scatter(-1, indices, kept), count


class TopAFASAE(StandardSAE):
    """A saved top-AFA SAE. Its decoder rows have norm 1."""

    cfg: TopAFASAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def encode(self, x: Tensor) -> Tensor:
        centred = self.process_sae_in(x)
        pre = self.hook_sae_acts_pre(centred @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(norm_matched(pre.relu(), centred.norm(dim=-1))[0])


class TopAFATrainingSAE(TopKTrainingSAE):
    """A top-AFA SAE in training."""

    cfg: TopAFATrainingSAEConfig  # pyright: ignore
    _sorted: int = _FIRST_COUNT

    @override
    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return torch.relu

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        centred = self.process_sae_in(x)
        pre = self.hook_sae_acts_pre(centred @ self.W_enc)  # b_enc stays 0
        pre = pre * self.W_dec.norm(dim=-1)
        norms = centred.norm(dim=-1)
        acts, self._sorted = norm_matched(self.activation_fn(pre), norms, self._sorted)
        return self.hook_sae_acts_post(acts), pre

    @override
    def get_coefficients(self) -> dict[str, TrainCoefficientConfig | float]:
        return {"afa": self.cfg.afa_coefficient}

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        x = step_input.sae_in
        gap = (feature_acts.norm(dim=-1) - x.norm(dim=-1)).square().mean()
        afa_loss = step_input.coefficients["afa"] * x.shape[-1] * gap
        return {
            "afa_loss": afa_loss,
            **super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out),
        }


register_sae_class("top_afa", TopAFASAE, TopAFASAEConfig)
register_sae_training_class("top_afa", TopAFATrainingSAE, TopAFATrainingSAEConfig)
