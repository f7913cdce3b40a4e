"""ITDA: a dictionary of activations, without gradient descent.

Leask, Nanda, Al Moubayed: *Inference-Time Decomposition of Activations (ITDA): A Scalable Approach
to Interpreting Large Language Models*, arXiv:2505.17769, section 3. The dictionary D is empty at
first. With the sparse code a of a sample x by matching pursuit (L0 steps, the atom with the largest
correlation in magnitude, so that activations can be negative):

    a = MP(x, D, L0),    x_hat = a D,    l(x) = |x - x_hat|^2,    if l(x) > tau: add x / |x| to D

There is no bias. Here `k` is L0, and D has room for d_sae atoms: the paper also crops D to a fixed
size for comparisons with SAEs. Atoms without content never fire.

Open, and our choice:

- tau has the unit of the data. `itda_threshold` is tau relative to the mean |x|^2 of the batch.
- The paper adds samples in batches and removes repeated atoms later. Here samples are taken 32 at a
  time, and a sample whose cosine with an atom of these 32 is above .999 is not added.
- Algorithm 1 writes OMP, section 3.2 describes MP. This is MP.
"""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import (
    SAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_atm.baselines.shared import require, require_one_scale
from sae_lens_atm.method.buffers import ExactBuffers

_AT_ONCE = 32
_SAME = 0.999


@dataclass
class ITDASAEConfig(StandardSAEConfig):
    """Configuration of a saved ITDA."""

    k: int = 32

    @override
    @classmethod
    def architecture(cls) -> str:
        return "itda"


@dataclass
class ITDATrainingSAEConfig(TrainingSAEConfig):
    """Configuration of an ITDA.

    Args:
        k: L0, the number of steps of matching pursuit.
        itda_threshold: tau, relative to the mean squared norm of the samples of a batch.
    """

    k: int = 32
    itda_threshold: float = 0.1

    @override
    @classmethod
    def architecture(cls) -> str:
        return "itda"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return ITDASAEConfig

    @override
    def __post_init__(self) -> None:
        require(self, "itda_threshold", 0 <= self.itda_threshold <= 1, "from 0 to 1")
        require_one_scale(self)
        super().__post_init__()


@torch.no_grad()
def matching_pursuit(x: Tensor, rows: Tensor, steps: int, products: Tensor | None = None) -> Tensor:
    """Return the sparse codes of samples.

    With the products of all pairs of atoms a step needs no product of matrices. If a few samples
    take fewer products in all their steps, the residual is updated instead.

    Args:
        x: samples, ``(batch, d_in)``.
        rows: atoms of norm 1, or 0 for none, ``(atoms, d_in)``.
        steps: number of steps.
        products: ``rows @ rows.T``, if it is known.
    """
    correlations = x @ rows.T
    codes, residual = torch.zeros_like(correlations), x
    if products is None and len(x) * steps >= len(rows):
        products = rows @ rows.T
    for _ in range(steps):
        best = correlations.abs().argmax(1, keepdim=True)
        values, chosen = correlations.gather(1, best), best.squeeze(1)
        codes.scatter_add_(1, best, values)
        if products is not None:
            correlations.addcmul_(products[chosen], values, value=-1)
        else:
            residual = residual - values * rows[chosen]
            correlations = residual @ rows.T
    return codes


class ITDASAE(StandardSAE):
    """A saved ITDA. Its encoder is the transposed dictionary."""

    cfg: ITDASAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def encode(self, x: Tensor) -> Tensor:
        samples = self.process_sae_in(x)
        codes = matching_pursuit(samples.reshape(-1, samples.shape[-1]), self.W_enc.T, self.cfg.k)
        return self.hook_sae_acts_post(codes.reshape(*samples.shape[:-1], self.cfg.d_sae))


class ITDATrainingSAE(ExactBuffers, TrainingSAE[ITDATrainingSAEConfig]):
    """An ITDA while its dictionary is filled."""

    b_enc: nn.Parameter
    size: Tensor
    """Number of atoms in the dictionary."""
    exact_buffers = ("size",)

    def __init__(self, cfg: ITDATrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.register_buffer("size", torch.zeros((), dtype=torch.int64, device=cfg.device))
        self._products: Tensor | None = None

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        zeros = torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
        self.b_enc = nn.Parameter(zeros)
        self.W_enc.data.zero_()  # the atoms; rows of W_dec without an atom are random directions

    @override
    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {}

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        return {}

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        samples = self.process_sae_in(x)
        if self._products is None:
            self._products = (self.W_enc.T @ self.W_enc).detach()
        flat = samples.reshape(-1, samples.shape[-1])
        codes = matching_pursuit(flat, self.W_enc.T, self.cfg.k, self._products)
        codes = self.hook_sae_acts_post(codes.reshape(*samples.shape[:-1], self.cfg.d_sae))
        return codes, codes

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if int(self.size) < self.cfg.d_sae:
            self.fill(self.process_sae_in(step_input.sae_in).detach().flatten(0, -2))
        with torch.no_grad():
            output = super().training_forward_pass(step_input)
        # SAELens' trainer calls `backward`. Nothing is trained.
        output.loss = output.loss + 0 * self.b_dec.sum()
        return output

    @torch.no_grad()
    def fill(self, batch: Tensor) -> None:
        """Add the samples that the dictionary does not reconstruct (algorithm 1)."""
        threshold = self.cfg.itda_threshold * batch.square().sum(1).mean()
        for samples in batch.split(_AT_ONCE):
            atoms = self.W_enc.T[: max(1, int(self.size))]  # at first one of zeros
            codes = matching_pursuit(samples, atoms, self.cfg.k)
            errors = (samples - codes @ atoms).square().sum(1)
            poor = samples[errors > threshold]
            new = poor / poor.norm(dim=1, keepdim=True)
            repeated = (new @ new.T).abs().tril(-1).amax(1) > _SAME if len(new) else new[:, 0] > 0
            self.add(new[~repeated])
        self._products = None

    def add(self, atoms: Tensor) -> None:
        """Add atoms, as many as there is room for."""
        start = int(self.size)
        atoms = atoms[: self.cfg.d_sae - start]
        self.W_dec.data[start : start + len(atoms)] = atoms
        self.W_enc.data[:, start : start + len(atoms)] = atoms.T
        self.size += len(atoms)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        # MP(s x) = s MP(x): the scale of the input has no effect.
        self.cfg.normalize_activations = "none"

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict.pop("size")

    @override
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._products = None

    @override
    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._products = None  # device or dtype may change
        return super()._apply(*args, **kwargs)


register_sae_class("itda", ITDASAE, ITDASAEConfig)
register_sae_training_class("itda", ITDATrainingSAE, ITDATrainingSAEConfig)
