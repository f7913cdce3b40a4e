"""LISTA-Matryoshka: an encoder of two steps and Matryoshka losses, tuned on SynthSAEBench.

Chanin: *Letting Claude do autonomous research to improve SAEs*, with code
(github.com/chanind/claude-auto-research-synthsaebench). It has the best published F1 on
SynthSAEBench (arXiv:2602.14687). With x_c = x - b_dec, and s a BatchTopK:

    p_0 = W_enc x_c + b_enc,    p_{t+1} = p_t + eta W_enc (x_c - W_dec s(p_t)),    z = s(p_T)
    L = TERM(|x - x_hat|^2) + sum_m TERM(|x - x_hat_m|^2) + L_aux

- LISTA (Gregor, LeCun 2010): T = 1 refinement with eta = 0.3.
- The levels m are prefixes of the latents in falling order of firing frequency, a moving average
  with decay .99. They are d_sae / 32, / 8 and / 2 wide. In level m only its own latents get a
  gradient.
- TERM (arXiv:2411.00743): the mean over samples with weights softmax(tau L_i / mean(L)). tau is
  .002.
- The number of active latents falls linearly over the run to k. It starts at `initial_k` times k,
  60 for k = 25.

Each step of the encoder has its own threshold, an average of SAELens' kind, in the saved SAE.

Different here: the code compares x_hat, which includes b_dec, with x - b_dec. This file compares it
with x. The learned eta, off in the published settings, is left out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    SAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKTrainingSAE,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.baselines.shared import CountsSteps, require, require_one_scale

_DIVISORS = (32, 8, 2)
_FREQUENCY_DECAY = 0.99


@dataclass
class ListaMatryoshkaSAEConfig(StandardSAEConfig):
    """Configuration of a saved LISTA-Matryoshka SAE."""

    refinements: int = 1
    eta: float = 0.3

    @override
    @classmethod
    def architecture(cls) -> str:
        return "lista_matryoshka"


@dataclass
class ListaMatryoshkaTrainingSAEConfig(BatchTopKTrainingSAEConfig):
    """Configuration of a LISTA-Matryoshka SAE.

    Args:
        refinements: T, the number of refinements of the pre-activations.
        eta: eta, their step size.
        matryoshka_widths: widths of the levels inside the whole SAE.
        term_tilt: tau. At 0 the losses are plain means.
        initial_k: number of active latents at the first step, as a multiple of k.
        schedule_steps: number of training steps. Run files set it.
    """

    refinements: int = 1
    eta: float = 0.3
    matryoshka_widths: list[int] = field(default_factory=list)
    term_tilt: float = 0.002
    initial_k: float = 2.4
    schedule_steps: int = 10_000

    @override
    @classmethod
    def architecture(cls) -> str:
        return "lista_matryoshka"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return ListaMatryoshkaSAEConfig

    @property
    def widths(self) -> list[int]:
        """The widths of the levels inside the whole SAE."""
        divided = {self.d_sae // divisor for divisor in _DIVISORS} - {0, self.d_sae}
        return self.matryoshka_widths or sorted(divided)

    @override
    def __post_init__(self) -> None:
        require(self, "refinements", self.refinements >= 0, "0 or more")
        require(self, "eta", 0 < self.eta <= 10, "above 0 and at most 10")
        rising = self.widths == sorted({w for w in self.widths if 0 < w < self.d_sae})
        allowed = f"rising, above 0 and below d_sae = {self.d_sae}"
        require(self, "matryoshka_widths", rising, allowed)
        require(self, "term_tilt", 0 <= self.term_tilt <= 100, "from 0 to 100")
        require(self, "initial_k", self.initial_k >= 1, "1 or more")
        require(self, "schedule_steps", self.schedule_steps >= 0, "0 or more")
        require(self, "rescale_acts_by_decoder_norm", self.rescale_acts_by_decoder_norm, "true")
        require_one_scale(self)
        super().__post_init__()


def refined(
    centred: Tensor,
    encoder: tuple[Tensor, Tensor],
    rows: Tensor,
    eta: float,
    activate: list[Callable[[Tensor], Tensor]],
) -> tuple[list[Tensor], Tensor]:
    """Return the activations of each step of the encoder, and the last pre-activations.

    Args:
        centred: samples minus b_dec.
        encoder: weights ``(d_in, d_sae)`` and bias.
        rows: the decoder ``(d_sae, d_in)``.
        eta: step size of refinements.
        activate: the activation function of each step.
    """
    weights, bias = encoder
    pre = centred @ weights + bias
    steps = [activate[0](pre)]
    for function in activate[1:]:
        pre = pre + eta * ((centred - steps[-1] @ rows) @ weights)
        steps.append(function(pre))
    return steps, pre


def above(threshold: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a JumpReLU with one threshold for all latents."""

    def activate(pre: Tensor) -> Tensor:
        return pre.relu() * (pre > threshold)

    return activate


def tilted_mean(losses: Tensor, tilt: float) -> Tensor:
    """Return the mean of the losses of samples, with more weight for larger ones."""
    if tilt == 0:
        return losses.mean()
    known = losses.detach()
    return (torch.softmax(tilt * known / known.mean(), dim=0) * losses).sum()


class ListaMatryoshkaSAE(StandardSAE):
    """A saved LISTA-Matryoshka SAE. Its decoder rows have norm 1."""

    cfg: ListaMatryoshkaSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    thresholds: Tensor
    """The threshold of each step of the encoder."""

    def __init__(self, cfg: ListaMatryoshkaSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        thresholds = torch.zeros(cfg.refinements + 1, dtype=self.dtype, device=cfg.device)
        self.register_buffer("thresholds", thresholds)

    @override
    def encode(self, x: Tensor) -> Tensor:
        activate = [above(one) for one in self.thresholds]
        encoder, centred = (self.W_enc, self.b_enc), self.process_sae_in(x)
        steps, _ = refined(centred, encoder, self.W_dec, self.cfg.eta, activate)
        return self.hook_sae_acts_post(steps[-1])


class ListaMatryoshkaTrainingSAE(CountsSteps, BatchTopKTrainingSAE):
    """A LISTA-Matryoshka SAE in training. In eval mode it equals the saved SAE."""

    cfg: ListaMatryoshkaTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    activation_fn: BatchTopK
    thresholds: Tensor
    frequencies: Tensor
    """Moving average of the firing frequency of each latent."""
    exact_buffers = ("steps", "topk_threshold", "thresholds", "frequencies")

    def __init__(self, cfg: ListaMatryoshkaTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        thresholds = torch.zeros(cfg.refinements + 1, dtype=torch.float64, device=cfg.device)
        self.register_buffer("thresholds", thresholds)
        frequencies = torch.zeros(cfg.d_sae, dtype=torch.float64, device=cfg.device)
        self.register_buffer("frequencies", frequencies)
        self._steps_of_encoder: list[Tensor] = []

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        norms = self.W_dec.norm(dim=-1)
        encoder, rows = (self.W_enc * norms, self.b_enc * norms), self.W_dec / norms.unsqueeze(1)
        activate: list[Callable[[Tensor], Tensor]] = [self.activation_fn] * len(self.thresholds)
        if not self.training:
            activate = [above(one.to(self.dtype)) for one in self.thresholds]
        centred = self.process_sae_in(x)
        self._steps_of_encoder, pre = refined(centred, encoder, rows, self.cfg.eta, activate)
        return self.hook_sae_acts_post(self._steps_of_encoder[-1]), pre

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        cfg, x = self.cfg, step_input.sae_in
        done = min(1.0, int(self.steps) / max(cfg.schedule_steps, 1))
        k = min(cfg.k * (cfg.initial_k + (1 - cfg.initial_k) * done), cfg.d_sae)
        self.activation_fn.k = k
        output = super().training_forward_pass(step_input)
        losses = output.losses
        losses["mse_loss"] = self.tilted_error(output.sae_out, x)
        for width, sae_out in self.level_reconstructions(output.feature_acts):
            losses[f"inner_mse_loss_{width}"] = self.tilted_error(sae_out, x)
        output.loss = torch.stack(list(losses.values())).sum()
        output.metrics |= {"k": k, "topk_threshold": self.thresholds[-1]}
        return output

    def tilted_error(self, sae_out: Tensor, x: Tensor) -> Tensor:
        """Return the squared error, by `tilted_mean`."""
        return tilted_mean(self.mse_loss_fn(sae_out, x).sum(dim=-1), self.cfg.term_tilt)

    def level_reconstructions(self, acts: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the width and the reconstruction of each level inside the whole SAE."""
        order = self.frequencies.argsort(descending=True, stable=True)
        norms = self.W_dec.norm(dim=-1)
        decoded, start = self.b_dec, 0
        for width in self.cfg.widths:
            own = order[start:width]
            rows = self.W_dec[own] / norms[own].unsqueeze(1)
            decoded = (decoded.detach() if start else decoded) + acts[..., own] @ rows
            yield width, self.run_time_activation_norm_fn_out(decoded)
            start = width

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        """Update the thresholds of all steps, and the firing frequencies."""
        rate = self.cfg.topk_threshold_lr
        for step, acts in enumerate(self._steps_of_encoder):
            if bool((acts > 0).any()):
                smallest = acts[acts > 0].min().to(self.thresholds.dtype)
                self.thresholds[step] = (1 - rate) * self.thresholds[step] + rate * smallest
        self._steps_of_encoder = []
        fired = (acts_topk.flatten(0, -2) > 0).to(self.frequencies.dtype).mean(0)
        decay = _FREQUENCY_DECAY if int(self.steps) else 0.0
        self.frequencies.mul_(decay).add_(fired, alpha=1 - decay)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self.thresholds /= scaling_factor  # see SAELens' method

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        TopKTrainingSAE.process_state_dict_for_saving_inference(self, state_dict)
        for name in ("steps", "topk_threshold", "frequencies"):
            state_dict.pop(name)
        state_dict["thresholds"] = state_dict["thresholds"].to(self.dtype)


register_sae_class("lista_matryoshka", ListaMatryoshkaSAE, ListaMatryoshkaSAEConfig)
register_sae_training_class(
    "lista_matryoshka", ListaMatryoshkaTrainingSAE, ListaMatryoshkaTrainingSAEConfig
)
