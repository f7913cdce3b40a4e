"""Contexts in which latents fire: the strongest, and some from each fifth of the activations."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sae_lens_atm.explore.reading import Reading

PARTS = 5
"""The activations of a latent, in ascending order, are divided into so many equal parts."""
WINDOW = 24
"""Number of tokens on each side of the token in question whose activations are shown."""
TOP = 0
"""The group of the strongest contexts. The parts have the numbers from 1 (weakest)."""
LEVELS = 255
"""Activations in a context are stored in so many steps of the latent's maximum."""


class Windows(NamedTuple):
    """Activations of latents around places in the text, for many places."""

    places: NDArray[np.uint32]
    """Places in the flattened contexts, shape ``(windows,)``."""
    starts: NDArray[np.uint32]
    """Where the activations of each window start, shape ``(windows + 1,)``."""
    offsets: NDArray[np.int8]
    """Position of each activation, from the place of the window."""
    levels: NDArray[np.uint8]
    """Each activation, in 1/`LEVELS` of the latent's maximum, at least 1."""


class Examples(NamedTuple):
    """The contexts of all latents."""

    starts: NDArray[np.uint32]
    """Where the windows of each latent start, shape ``(d_sae + 1,)``."""
    groups: NDArray[np.uint8]
    """`TOP`, or the number of the part of the activations, for each window."""
    windows: Windows


class Amount(NamedTuple):
    """How many contexts are shown."""

    top: int
    part: int
    """From each part of the activations."""
    pair: int
    """Of each kind, for a parent and a child."""


def windows_at(
    reading: Reading, latents: Sequence[int], rows: Sequence[NDArray[np.int64]], context_size: int
) -> Windows:
    """Return the activations of latents around rows of a reading.

    Args:
        reading: what the SAE does on the tokens.
        latents: the latents.
        rows: the rows of each of them.
        context_size: number of tokens of a context. A window does not leave its context.
    """
    places: list[NDArray[np.uint32]] = []
    counts: list[NDArray[np.int64]] = []
    offsets: list[NDArray[np.int8]] = []
    levels: list[NDArray[np.uint8]] = []
    for latent, wanted in zip(latents, rows, strict=True):
        fires, acts = reading.column(latent)
        where = reading.places[fires]
        at = reading.places[wanted]
        first = at // context_size * context_size
        low = np.searchsorted(where, np.maximum(at - WINDOW, first))
        high = np.searchsorted(where, np.minimum(at + WINDOW + 1, first + context_size))
        number = high - low
        index = np.arange(number.sum()) + np.repeat(low - (number.cumsum() - number), number)
        top = acts.max(initial=0) or 1
        places.append(at.astype(np.uint32))
        counts.append(number)
        offsets.append((where[index] - np.repeat(at, number)).astype(np.int8))
        levels.append(np.ceil(acts[index] * (LEVELS / top)).clip(1, LEVELS).astype(np.uint8))
    ends = np.cumsum(np.concatenate([[0], *counts])).astype(np.uint32)
    return Windows(
        np.concatenate([np.zeros(0, np.uint32), *places]),
        ends,
        np.concatenate([np.zeros(0, np.int8), *offsets]),
        np.concatenate([np.zeros(0, np.uint8), *levels]),
    )


def find_examples(reading: Reading, context_size: int, amount: Amount, seed: int = 0) -> Examples:
    """Return contexts of each latent: the strongest, then random ones from each part.

    A context is shown once among the strongest, at its strongest token.

    Args:
        reading: what the SAE does on the tokens.
        context_size: number of tokens of a context.
        amount: how many contexts.
        seed: seed of the random choice.
    """
    random = np.random.default_rng(seed)
    d_sae = reading.acts.shape[1]
    rows: list[NDArray[np.int64]] = []
    groups: list[NDArray[np.uint8]] = []
    for latent in range(d_sae):
        fires, acts = reading.column(latent)
        order = np.argsort(-acts, kind="stable")
        best = _one_per_context(reading.places[fires[order]] // context_size, amount.top)
        chosen, group = [order[best]], [np.full(len(best), TOP, np.uint8)]
        if amount.part and len(order) > amount.top:
            for number, part in enumerate(np.array_split(order[::-1], PARTS), start=1):
                some = random.permutation(part)[: amount.part]
                chosen.append(some)
                group.append(np.full(len(some), number, np.uint8))
        rows.append(fires[np.concatenate(chosen)].astype(np.int64))
        groups.append(np.concatenate(group))
    starts = np.cumsum([0, *map(len, rows)]).astype(np.uint32)
    return Examples(
        starts,
        np.concatenate([np.zeros(0, np.uint8), *groups]),
        windows_at(reading, range(d_sae), rows, context_size),
    )


def _one_per_context(contexts: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return the places of the first occurrences of up to `most` contexts, ascending."""
    return np.sort(np.unique(contexts, return_index=True)[1])[:most]
