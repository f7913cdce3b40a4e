"""Parents and children among the latents, and the tokens on which a parent was absorbed.

Two sources name the parents of a latent. A training checkpoint of ATM holds those that the method
found. For any other SAE they are found in the same way in the activations that were read, see
`method.parents`: latent ``j`` implies latent ``i`` if the inputs on which ``j`` fires contain the
direction of ``i`` about as much as the inputs on which ``i`` fires, and ``i`` is more important.
Dense latents are left out there, and so are pairs that neither fire together `MIN_LIFT` times as
often as by chance nor have a cosine of `MIN_COSINE`.
"""

from collections import defaultdict
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_atm.explore.examples import Amount, Windows, windows_at
from sae_lens_atm.explore.latents import DENSE
from sae_lens_atm.explore.reading import Reading
from sae_lens_atm.method.parents import implied_parents, lift
from sae_lens_atm.metrics.absorption import ABSORBED_SHARE

TAU = 0.45
"""Least lift of a child, as a share of the parent's own lift. ATM's `parent_tau`."""
CHANCE = 3.0
"""Least lift of a child, as a multiple of those by chance. ATM's `parent_chance`."""
MIN_LIFT = 2.0
MIN_COSINE = 0.3
MOST_PARENTS = 8
_CANDIDATES = 64
_ROWS = 1024  # latents in a product
ABSORBED, MISSED, TOGETHER = 0, 1, 2
"""The kinds of contexts of a pair, see `PairExamples`."""


class Pairs(NamedTuple):
    """Children with their parents. Each array has the shape ``(pairs,)``."""

    child: NDArray[np.uint32]
    parent: NDArray[np.uint32]
    direct: NDArray[np.uint8]
    """1 unless another parent of the child has the same parent."""
    cosine: NDArray[np.float32]
    """Of the decoder rows."""
    together: NDArray[np.float32]
    """Share of the child's tokens on which the parent fires, too."""
    lift: NDArray[np.float32]
    """`together`, in multiples of the parent's frequency."""
    absorbed: NDArray[np.float32]
    """Share of the child's tokens on which the parent is absorbed, see `is_absorbed`."""


class PairExamples(NamedTuple):
    """Contexts of pairs: some where the parent is absorbed, some where it only does not fire."""

    starts: NDArray[np.uint32]
    """Where the contexts of each pair start, shape ``(pairs + 1,)``."""
    kinds: NDArray[np.uint8]
    """`ABSORBED`, `MISSED` or `TOGETHER`, for each context."""
    child: Windows
    parent: Windows


def is_absorbed(
    child: NDArray[np.float32],
    parent: NDArray[np.float32],
    carried: float | NDArray[Any],
    typical: float,
) -> NDArray[np.bool_]:
    """Return on which tokens a child absorbs its parent.

    The parent does not fire, and the child adds at least `ABSORBED_SHARE` of what the parent adds
    along the parent's direction on the median token on which it fires.

    Args:
        child: activations of the child, on tokens on which it fires.
        parent: activations of the parent on the same tokens.
        carried: length of the child's decoder row along the parent's direction.
        typical: median activation of the parent where it fires, times the length of its row.
    """
    return (parent <= 0) & (child * carried >= ABSORBED_SHARE * typical) & (typical > 0)


def implied_pairs(reading: Reading, importance: Tensor) -> NDArray[np.int64]:
    """Return the parents that the latents imply on the tokens, ``(d_sae, n)``, padded with -1.

    They are candidates: `describe_pairs` chooses among them.
    """
    d_sae = len(reading.decoder)
    magnitude = torch.from_numpy(np.asarray(reading.acts.mean(0)).ravel()).float()
    frequency = torch.from_numpy(np.diff(reading.acts.indptr) / max(reading.rows, 1))
    own = torch.zeros(d_sae)
    blocks = list(torch.arange(d_sae).split(_ROWS))
    for rows in blocks:
        lifts = lift(reading.inputs[rows], magnitude[rows], reading.mean_input, reading.decoder)
        own[rows] = lifts.gather(1, rows[:, None]).squeeze(1)
    own = own.where(frequency > 0, 0.0)
    found: list[Tensor] = []
    for rows in blocks:
        lifts = lift(reading.inputs[rows], magnitude[rows], reading.mean_input, reading.decoder)
        lifts = lifts.where(frequency <= DENSE, 0.0)  # no parents
        found.append(implied_parents(lifts, own, importance, rows, TAU, CHANCE, _CANDIDATES))
    return torch.cat(found).numpy()


def describe_pairs(reading: Reading, parents: NDArray[np.int64], choose: bool) -> Pairs:
    """Return pairs with their figures, by child and then by how often the parent fires with it.

    Args:
        reading: what the SAE does on the tokens.
        parents: the parents of each latent, padded with -1.
        choose: leave out pairs that do not fire together, and keep up to `MOST_PARENTS` of a child.
    """
    children, places = np.nonzero(parents >= 0)
    by_parent: dict[int, list[int]] = defaultdict(list)
    for child, place in zip(children.tolist(), places.tolist(), strict=True):
        by_parent[int(parents[child, place])].append(child)
    length = reading.decoder.norm(dim=-1)
    rows: list[tuple[int, int, float, float, float, float]] = []
    for parent, its_children in by_parent.items():
        beside, frequency, typical = _of_parent(reading, parent, float(length[parent]))
        along = (reading.decoder[its_children] @ reading.decoder[parent]) / length[parent]
        cosine = (along / length[its_children]).numpy()
        where, of_child, starts = reading.columns(its_children)
        of_parent, counts = beside[where], np.diff(starts)
        carried = np.repeat(along.numpy(), counts)
        lost = is_absorbed(of_child, of_parent, carried, typical)
        together, absorbed = (
            np.diff(np.append(0, flags.cumsum())[starts]) / np.maximum(counts, 1)
            for flags in (of_parent > 0, lost)
        )
        multiple = together / frequency if frequency else np.zeros_like(together)
        keep = (multiple >= MIN_LIFT) | (cosine >= MIN_COSINE) | (not choose)
        figures = np.stack([cosine, together, multiple, absorbed], axis=1)[keep].tolist()
        kept_children = np.array(its_children)[keep].tolist()
        rows += [
            (child, parent, *of_pair) for child, of_pair in zip(kept_children, figures, strict=True)
        ]
    rows.sort(key=lambda row: (row[0], -row[3] - row[5]))
    kept: list[tuple[int, int, float, float, float, float]] = []
    number: dict[int, int] = defaultdict(int)
    for row in rows:
        number[row[0]] += 1
        if not choose or number[row[0]] <= MOST_PARENTS:
            kept.append(row)
    columns = list(zip(*kept, strict=True)) if kept else [()] * 6
    child, parent = (np.array(column, dtype=np.uint32) for column in columns[:2])
    figures = [np.array(column, dtype=np.float32) for column in columns[2:]]
    return Pairs(child, parent, _direct(child, parent), *figures)


def _of_parent(
    reading: Reading, parent: int, length: float
) -> tuple[NDArray[np.float32], float, float]:
    """Return the activations on all rows, the frequency, and `typical` of `is_absorbed`."""
    fires, acts = reading.column(parent)
    dense = np.zeros(reading.rows, dtype=np.float32)
    dense[fires] = acts
    typical = float(np.median(acts)) * length if len(acts) else 0.0
    return dense, len(fires) / max(reading.rows, 1), typical


def _direct(child: NDArray[np.uint32], parent: NDArray[np.uint32]) -> NDArray[np.uint8]:
    parents_of: dict[int, set[int]] = defaultdict(set)
    for one, other in zip(child.tolist(), parent.tolist(), strict=True):
        parents_of[one].add(other)
    return np.array(
        [
            # A circle, which averages from different times can make, stays visible.
            not any(
                other in parents_of[k] and k not in parents_of[other]
                for k in parents_of[one] - {other}
            )
            for one, other in zip(child.tolist(), parent.tolist(), strict=True)
        ],
        dtype=np.uint8,
    )


def find_pair_examples(
    reading: Reading, pairs: Pairs, context_size: int, amount: Amount
) -> PairExamples:
    """Return contexts of each pair, the strongest of each kind first."""
    length = reading.decoder.norm(dim=-1)
    of_parents = pairs.parent.astype(np.int64)
    along = (reading.decoder[pairs.child.astype(np.int64)] * reading.decoder[of_parents]).sum(-1)
    along = (along / length[of_parents]).tolist()
    rows: list[NDArray[np.int64]] = [np.zeros(0, np.int64)] * len(pairs.child)
    kinds: list[NDArray[np.uint8]] = [np.zeros(0, np.uint8)] * len(pairs.child)
    by_parent = np.argsort(pairs.parent, kind="stable").tolist()
    for parent, some in groupby(by_parent, key=lambda pair: int(pairs.parent[pair])):
        beside, _, typical = _of_parent(reading, parent, float(length[parent]))
        for pair in some:
            where, of_child = reading.column(int(pairs.child[pair]))
            of_parent = beside[where]
            lost = is_absorbed(of_child, of_parent, along[pair], typical)
            order = np.argsort(-of_child, kind="stable")
            of_kinds = (lost, (of_parent <= 0) & ~lost, of_parent > 0)
            chosen = [order[of_kind[order]][: amount.pair] for of_kind in of_kinds]
            rows[pair] = where[np.concatenate(chosen)].astype(np.int64)
            numbers = [np.full(len(few), kind, np.uint8) for kind, few in enumerate(chosen)]
            kinds[pair] = np.concatenate(numbers)
    return PairExamples(
        np.cumsum([0, *map(len, rows)]).astype(np.uint32),
        np.concatenate([np.zeros(0, np.uint8), *kinds]),
        windows_at(reading, pairs.child.tolist(), rows, context_size),
        windows_at(reading, pairs.parent.tolist(), rows, context_size),
    )
