"""OrtSAE: BatchTopK with a penalty on similar decoder rows.

Korznikov, Galichin, Dontsov, Rogov, Tutubalina, Oseledets: *OrtSAE: Orthogonal Sparse Autoencoders
Uncover Atomic Features*, arXiv:2509.22033, equations 3 to 5:

    L = L_MSE + alpha L_aux + gamma L_orthogonal
    L_orthogonal = 1/K sum_k 1/|C_k| sum_{i in C_k} (max_{j in C_k, j != i} cos(W_i, W_j))^2
    cos(W_i, W_j) = <W_i, W_j> / max(|W_i| |W_j|, delta)

Each step draws a random partition of the m latents into K = ceil(m / 8192) equal chunks C_k. gamma
is 0.25. Appendix C also computes the penalty in every fifth step with 5 gamma (`ort_interval`).

The paper leaves open:

- The scale of L_MSE. It builds on the code of BatchTopK, whose error is a mean over the d_in
  dimensions of standardised inputs. SAELens sums over dimensions and does not standardise. gamma is
  therefore multiplied by the variance of the batch, summed over dimensions. It then has the paper's
  meaning at every scale and width.
- delta: 1e-8 here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    register_sae_training_class,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.baselines.shared import CountsSteps, require, require_one_scale
from sae_lens_atm.method.masking import uniform_at

_DELTA = 1e-8
_BLOCK = 512  # rows whose similarities are computed at once
_STREAM = 0  # of the random partition, see `uniform_at`


@dataclass
class OrtSAETrainingSAEConfig(BatchTopKTrainingSAEConfig):
    """Configuration of an OrtSAE.

    Args:
        ort_coefficient: gamma, relative to the variance of the batch.
        ort_chunk_size: largest number of latents in a chunk.
        ort_interval: steps from one penalty to the next. gamma is multiplied by it.
        ort_seed: seed of the partitions.
    """

    ort_coefficient: float = 0.25
    ort_chunk_size: int = 8192
    ort_interval: int = 1
    ort_seed: int = 0

    @override
    @classmethod
    def architecture(cls) -> str:
        return "ortsae"

    @override
    def __post_init__(self) -> None:
        require(self, "ort_coefficient", 0 <= self.ort_coefficient <= 1e6, "from 0 to 1e6")
        # With 2 a chunk could have a single latent.
        require(self, "ort_chunk_size", self.ort_chunk_size >= 3, "3 or more")
        require(self, "ort_interval", self.ort_interval >= 1, "1 or more")
        require_one_scale(self, or_whitening=True)
        super().__post_init__()


class OrtSAETrainingSAE(CountsSteps, BatchTopKTrainingSAE):
    """An OrtSAE. It is saved as SAELens' `jumprelu`."""

    cfg: OrtSAETrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    exact_buffers = ("steps", "topk_threshold")

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        step = int(self.steps)
        output = super().training_forward_pass(step_input)
        penalty = output.loss.new_zeros(())
        if step % self.cfg.ort_interval == 0:
            scale = self.cfg.ort_coefficient * self.cfg.ort_interval
            penalty = scale * total_variance(step_input.sae_in) * self.orthogonality()
        output.losses["orthogonality_loss"] = penalty
        output.loss = output.loss + penalty
        return output

    def orthogonality(self) -> Tensor:
        """Return ``L_orthogonal`` of the decoder, for the partition of this step."""
        return torch.stack([chunk_penalty(self.W_dec[chunk]) for chunk in self.chunks()]).mean()

    def chunks(self) -> Iterator[Tensor | slice]:
        """Yield the indices of the latents of each chunk."""
        count = ceil(self.cfg.d_sae / self.cfg.ort_chunk_size)
        if count == 1:
            yield slice(None)
            return
        uniform = uniform_at(self.steps, self.cfg.ort_seed, _STREAM, (self.cfg.d_sae,))
        yield from uniform.argsort().tensor_split(count)


def total_variance(x: Tensor) -> Tensor:
    """Return the variance of a batch, summed over dimensions, without gradient."""
    return x.detach().flatten(0, -2).var(0, correction=0).sum()


def chunk_penalty(rows: Tensor) -> Tensor:
    """Return the mean over rows of the squared largest cosine with another row.

    Only the largest cosine of a row has a gradient. The search for it needs none.
    """
    if len(rows) < 2:
        return rows.sum() * 0
    norms = rows.norm(dim=1)
    nearest = nearest_rows((rows / norms.clamp(min=_DELTA).unsqueeze(1)).detach())
    products = (rows * rows[nearest]).sum(1)
    return (products / (norms * norms[nearest]).clamp(min=_DELTA)).square().mean()


@torch.no_grad()
def nearest_rows(rows: Tensor) -> Tensor:
    """Return for each row the index of the other row with the largest inner product.

    Each pair is computed once, in blocks, so that no square matrix of all rows is stored.
    """
    count = len(rows)
    largest = rows.new_full((count,), -torch.inf)
    nearest = torch.zeros(count, dtype=torch.int64, device=rows.device)
    for start in range(0, count, _BLOCK):
        block = slice(start, start + _BLOCK)
        products = rows[block] @ rows[start:].T
        products.diagonal().fill_(-torch.inf)
        own, index = products.max(1)
        better = own > largest[block]
        nearest[block] = torch.where(better, index + start, nearest[block])
        largest[block] = torch.maximum(own, largest[block])
        if start + _BLOCK < count:
            later = slice(start + _BLOCK, None)
            value, index = products[:, _BLOCK:].max(0)
            better = value > largest[later]
            nearest[later] = torch.where(better, index + start, nearest[later])
            largest[later] = torch.maximum(value, largest[later])
    return nearest


register_sae_training_class("ortsae", OrtSAETrainingSAE, OrtSAETrainingSAEConfig)
