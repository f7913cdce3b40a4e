"""Two figures of a decoder, without labels, by which an L0 can be chosen.

An SAE whose L0 is too low or too high learns latents that mix features. Its decoder rows then point
in similar directions, and project on many inputs that do not have their feature. "Sparse but Wrong"
(Chanin & Garriga-Alonso, arXiv 2508.16560) finds both figures smallest near the true L0. On our
synthetic models `saved_bits` is more reliable (docs/lab-notebook.md, section 22).
"""

import math

import torch
from torch import Tensor

from sae_lens_atm.metrics.stability import alive_directions

_CHUNK = 1024  # rows of the matrix of cosines computed at once


def decoder_cosine(decoder: Tensor, alive: Tensor | None = None) -> float:
    """Return the mean absolute cosine of all pairs of decoder rows.

    ``c_dec = 2 / (n (n - 1)) * sum over i < j of |cos(d_i, d_j)|``, over the ``n`` alive latents.

    Args:
        decoder: decoder rows of any length, shape ``(latents, d_in)``.
        alive: true for alive latents, shape ``(latents,)``; default: all.

    Returns:
        The mean, or NaN if fewer than two latents are alive.
    """
    rows = alive_directions(decoder, alive)
    n = len(rows)
    if n < 2:
        return math.nan
    parts = (part @ rows.T for part in rows.split(_CHUNK))
    total = sum(float(cosines.abs().sum(dtype=torch.float64)) for cosines in parts)
    own = float((rows * rows).sum(dtype=torch.float64))  # of each row with itself
    return (total - own) / (n * (n - 1))


class DecoderCosine:
    """Mean absolute cosine of the decoder rows of the latents that fire: `decoder_cosine`.

    Call `update` with the activations of each batch, then `compute`.

    Args:
        decoder: decoder rows of any length, shape ``(latents, d_in)``.
    """

    def __init__(self, decoder: Tensor) -> None:
        self._decoder = decoder.detach()
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self.alive = torch.zeros(len(self._decoder), dtype=torch.bool, device=self._decoder.device)

    def update(self, acts: Tensor) -> None:
        """Note which latents fire.

        Args:
            acts: activations, shape ``(..., latents)``.
        """
        if acts.shape[-1] != len(self._decoder):
            raise ValueError(
                f"activations have shape {tuple(acts.shape)}, the decoder has "
                f"{len(self._decoder)} rows"
            )
        self.alive |= (acts != 0).flatten(0, -2).any(0).to(self.alive.device)

    def compute(self) -> float:
        """Return the mean over pairs of latents that fired; NaN if fewer than two did."""
        return decoder_cosine(self._decoder, self.alive)


class NthDecoderProjection:
    """The n-th largest projection of an input on the decoder rows, ``s_n_dec``.

    All projections ``(x - b_dec) . d_i / |d_i|`` of ``B`` inputs are sorted in falling order. The
    figure is number ``n B``, counted from 0: about the n-th largest projection of an input. Call
    `update` with inputs, then `compute`.

    Args:
        decoder: decoder rows of any length, shape ``(latents, d_in)``.
        bias: decoder bias, shape ``(d_in,)``.
        samples: number of inputs to use: the first ones.
    """

    def __init__(self, decoder: Tensor, bias: Tensor, samples: int = 1024) -> None:
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self._decoder, self._bias = decoder.detach().float(), bias.detach().float()
        self._samples = samples
        self.reset()

    def reset(self) -> None:
        """Forget all inputs."""
        self._inputs: list[Tensor] = []

    @property
    def _seen(self) -> int:
        return sum(map(len, self._inputs))

    def update(self, x: Tensor) -> None:
        """Add inputs, up to the number of samples.

        Args:
            x: inputs of the SAE, shape ``(..., d_in)``.
        """
        x = x.detach().flatten(0, -2)[: self._samples - self._seen]
        self._inputs.append(x.to(self._decoder.device).float())

    def compute(self, alive: Tensor | None = None, n: int | None = None) -> float:
        """Return the figure, or NaN without inputs or alive latents.

        Args:
            alive: true for alive latents, shape ``(latents,)``; default: all. Others are left out.
            n: default: half of the alive latents, as the paper advises.
        """
        rows = alive_directions(self._decoder, alive)
        n = len(rows) // 2 if n is None else n
        if not self._seen or not len(rows):
            return math.nan
        if not 0 <= n < len(rows):
            raise ValueError(f"n must be from 0 to {len(rows) - 1}, got {n}")
        x = torch.cat(self._inputs) - self._bias
        projections = (x.cpu() @ rows.T).flatten()
        place = len(projections) - n * len(x)  # kthvalue counts from the smallest, from 1
        return float(projections.kthvalue(place).values)
