"""What the page shows of each latent: figures, histogram, top tokens, nearest decoder rows."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_atm.explore.reading import Reading, Sparse
from sae_lens_atm.method.importance import combine_signals

DENSE = 0.1
"""A latent is dense if it fires on more than this share of the tokens."""
BINS = 20
TOP_TOKENS = 5
NEAREST = 8
NONE = 2**32 - 1
"""Stands for no entry in lists of indices."""
_ROWS = 1024  # decoder rows in a product


class Latents(NamedTuple):
    """Figures of the latents, each of shape ``(d_sae,)`` or ``(d_sae, n)``."""

    importance: NDArray[np.float32]
    frequency: NDArray[np.float32]
    mean: NDArray[np.float32]
    """Mean activation on the tokens on which the latent fires."""
    maximum: NDArray[np.float32]
    contribution: NDArray[np.float32]
    """Increase of the squared error without the latent, as a share of the variance."""
    histogram: NDArray[np.uint32]
    """Numbers of activations in `BINS` equal parts of the range from 0 to the maximum."""
    tokens: NDArray[np.uint32]
    """The tokens of the latent, see `_top_tokens`; `NONE` at the end."""
    near: NDArray[np.uint32]
    """The other latents whose decoder rows have the largest cosines."""
    near_cosine: NDArray[np.float32]


def describe_latents(
    reading: Reading, occurs: Sparse, weights: tuple[float, float, float]
) -> Latents:
    """Return the figures of all latents.

    Args:
        reading: what the SAE does on the tokens.
        occurs: how strongly each token occurs in each row of the reading, ``(tokens, rows)``.
        weights: weights of magnitude, frequency and contribution in the importance.
    """
    acts, signals = reading.acts, reading.signals
    counts = np.diff(acts.indptr)
    maximum = _largest(reading)
    near, cosine = nearest_rows(reading.decoder)
    return Latents(
        importance=combine_signals(signals, weights).numpy(),
        frequency=(counts / max(reading.rows, 1)).astype(np.float32),
        mean=(np.asarray(acts.sum(0)).ravel() / np.maximum(counts, 1)).astype(np.float32),
        maximum=maximum,
        contribution=(signals.contribution / (reading.variance or 1)).numpy(),
        histogram=_histograms(reading, maximum),
        tokens=_top_tokens(reading, occurs),
        near=near,
        near_cosine=cosine,
    )


def _largest(reading: Reading) -> NDArray[np.float32]:
    columns = (reading.column(j)[1] for j in range(reading.acts.shape[1]))
    return np.array([acts.max(initial=0) for acts in columns], dtype=np.float32)


def _histograms(reading: Reading, maximum: NDArray[np.float32]) -> NDArray[np.uint32]:
    found = np.zeros((len(maximum), BINS), dtype=np.uint32)
    for latent in np.flatnonzero(maximum).tolist():
        acts = reading.column(latent)[1]
        bins = np.minimum((acts * (BINS / maximum[latent])).astype(int), BINS - 1)
        found[latent] = np.bincount(bins, minlength=BINS)
    return found


def _top_tokens(reading: Reading, occurs: Sparse) -> NDArray[np.uint32]:
    """Return the tokens with the largest sums of activations over the root of their number.

    The sum alone prefers frequent tokens, and the mean prefers those that occur once.
    """
    sums = (occurs @ reading.acts).tocsc()
    times = np.diff(occurs.tocsr().indptr)
    weight = 1 / np.sqrt(np.maximum(times, 1))
    found = np.full((sums.shape[1], TOP_TOKENS), NONE, dtype=np.uint32)
    for latent in range(sums.shape[1]):
        part = slice(sums.indptr[latent], sums.indptr[latent + 1])
        score = sums.data[part] * weight[sums.indices[part]]
        best = np.argsort(-score, kind="stable")[:TOP_TOKENS]
        found[latent, : len(best)] = sums.indices[part][best]
    return found


def nearest_rows(decoder: Tensor) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Return the `NEAREST` other rows of largest cosine for each row, and the cosines.

    Both have the shape ``(rows, NEAREST)``, or fewer columns for a small decoder.
    """
    unit = torch.nn.functional.normalize(decoder, dim=-1)
    most = min(NEAREST, len(unit) - 1)
    indices: list[Tensor] = []
    cosines: list[Tensor] = []
    for start in range(0, len(unit), _ROWS):
        cosine = unit[start : start + _ROWS] @ unit.T
        own = torch.arange(len(cosine))
        cosine[own, own + start] = -torch.inf
        best = cosine.topk(most, dim=1)
        indices.append(best.indices)
        cosines.append(best.values)
    return torch.cat(indices).numpy().astype(np.uint32), torch.cat(cosines).numpy()
