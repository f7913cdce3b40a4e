"""The texts of the tokens on the page, each once, and the tokens as indices into them."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from sae_lens_atm.explore.latents import NONE


class Strings:
    """The tokens that occur on a page.

    Args:
        tokens: arrays of tokens. `NONE` is no token.
    """

    def __init__(self, tokens: Iterable[NDArray[np.integer]]) -> None:
        used = np.unique(np.concatenate([np.unique(part).astype(np.int64) for part in tokens]))
        self.used: NDArray[np.int64] = used[used != NONE]

    def index(self, tokens: NDArray[np.integer]) -> NDArray[np.uint32]:
        """Return the places of tokens among those that are used; `NONE` stays."""
        places = np.searchsorted(self.used, tokens).astype(np.uint32)
        return np.where(tokens == NONE, np.uint32(NONE), places)

    def small_index(self, tokens: NDArray[np.integer]) -> NDArray[np.uint16] | NDArray[np.uint32]:
        """Return the same for tokens without `NONE`, in 16 bits if they are enough."""
        places = self.index(tokens)
        return places.astype(np.uint16) if len(self.used) <= 2**16 else places
