"""Two SAEs side by side: for each latent of one, the nearest latent of the other."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sae_lens_atm.explore.examples import Examples, Windows, windows_at
from sae_lens_atm.explore.latents import NONE
from sae_lens_atm.explore.reading import Reading

SAME = 0.7
"""Two latents count as the same from this cosine of their decoder rows on."""
_ROWS = 1024  # decoder rows in a product


class Matches(NamedTuple):
    """The nearest latents of another SAE, and their activations in the contexts of these."""

    latent: NDArray[np.uint32]
    """The latent of the other SAE, shape ``(d_sae,)``; `NONE` if all its latents are dead."""
    cosine: NDArray[np.float32]
    """Of the decoder rows."""
    windows: Windows


def nearest_in(decoder: Tensor, other: Tensor, fires: Tensor) -> tuple[Tensor, Tensor]:
    """Return the row of largest cosine in another decoder for each row, and the cosine.

    Args:
        decoder: rows, shape ``(d_sae, d_in)``.
        other: the rows of the other decoder.
        fires: true for the rows of `other` that may be chosen. One must be.
    """
    unit, target = functional.normalize(decoder, dim=-1), functional.normalize(other, dim=-1)
    parts = [(part @ target.T).where(fires, -torch.inf).max(1) for part in unit.split(_ROWS)]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def match(reading: Reading, other: Reading, examples: Examples, context_size: int) -> Matches:
    """Return the matches of an SAE in another one that has read the same tokens.

    Args:
        reading: what the SAE does on the tokens.
        other: what the other SAE does on them.
        examples: the contexts of the first SAE's latents.
        context_size: number of tokens of a context.
    """
    d_sae = len(reading.decoder)
    fires = torch.from_numpy(np.diff(other.acts.indptr) > 0)
    places = examples.windows.places.astype(np.int64)
    if not fires.any():
        empty = [np.zeros(0, np.int64)] * d_sae
        nothing = windows_at(other, [0] * d_sae, empty, context_size)
        latent = np.full(d_sae, NONE, dtype=np.uint32)
        return Matches(latent, np.zeros(d_sae, dtype=np.float32), nothing)
    latent, cosine = nearest_in(reading.decoder, other.decoder, fires)
    rows = np.searchsorted(other.places, places)
    of_latents = np.split(rows, examples.starts[1:-1].astype(np.int64))
    windows = windows_at(other, latent.tolist(), of_latents, context_size)
    return Matches(latent.numpy().astype(np.uint32), cosine.numpy(), windows)
