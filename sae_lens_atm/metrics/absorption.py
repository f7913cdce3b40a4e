"""Feature absorption against a known hierarchy of features.

A parent feature is absorbed where it is active but the latents that detect it stay silent, because
a latent of one of its children carries the parent's direction along. This is SAEBench 0.6.0's
definition and its constants, with the true direction of the parent in the place of a probe, and
one rule that the ground truth allows and small hierarchies need: a latent belongs to the feature
that it detects best, and a latent of a descendant is never a main latent. Without it the very
latents that absorb a parent count as its feature splits as soon as each child covers a few percent
of the parent's samples, and the SAE that absorbs most scores 0.

For a parent ``p`` of direction ``g_p`` (unit norm) and a sample where it is active, ``t`` is the
projection of its own contribution on ``g_p``, and latent ``j`` contributes ``a_j <d_j, g_p>``.

- Main latents, among those that do not belong to a descendant of ``p``: the one that detects ``p``
  with the highest F1 (ties: highest cosine), plus feature splits, as long as another latent raises
  the F1 of the union by more than 0.03.
- Absorbers: the up to 3 other latents of cosine >= 0.1 with the largest positive contributions.
- Fraction: 0 if main >= t or absorbers < 0.4 t; 1 if main <= 0; else, with
  ``A = min(absorbers, t - main)``, ``A / (A + main)``.
- Full: no main latent fires, and the largest single absorber (cosine >= 0.025) has at least 0.4 t.

Scores are averaged over the samples of a parent, then over parents.

Where activations can be negative, the cosine of an absorber is that of the direction that it
writes on the sample, ``sign(a_j) cos(d_j, g_p)``: the sign of a decoder row means nothing there.
For the same reason `signed` takes the other cosines, those of no sample, without their sign.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SPLIT_GAIN = 0.03
MAX_ABSORBERS = 3
ABSORBER_COSINE = 0.1
FULL_ABSORBER_COSINE = 0.025
ABSORBED_SHARE = 0.4
LEARNED_COSINE = 0.8
_CHUNK = 2**16  # (sample, parent) pairs looked at together
_FEATURE_CHUNK = 512  # features whose F1 with every latent is held at once


@dataclass(frozen=True)
class AbsorptionScores:
    """What `Absorption` measured. Lower is better, but for the shares learned.

    A mean over nothing (no parent was active, say) is NaN.
    """

    full: float
    """Mean over parents of the share of samples on which the parent is fully absorbed."""
    fraction: float
    """Mean over parents of the mean absorbed fraction."""
    recall_gap: float
    """Recall of the main latents without an active child, minus recall with one."""
    full_learned: float
    """`full`, on samples with an active child that has a latent of its own (cosine > 0.8)."""
    fraction_learned: float
    """`fraction`, on those samples."""
    parents_learned: float
    """Share of parents that have a latent of their own (cosine > 0.8)."""
    children_learned: float
    """Share of children that have one. A SAE that learned no children cannot absorb."""
    full_by_parent: Tensor
    """`full` of each parent, NaN for a parent that was never active."""
    fraction_by_parent: Tensor
    """`fraction` of each parent."""
    main_latents: Tensor
    """Which latents are main latents of which parent: boolean, ``(parents, latents)``."""


class Active(NamedTuple):
    """The latents that fire on each sample, padded with zeros to the most that any sample has."""

    latent: Tensor
    """Latent indices, ``(samples, k)``."""
    value: Tensor
    """Their activations, 0 where padded."""


class Pairs(NamedTuple):
    """The (sample, parent) pairs on which a parent is active."""

    sample: Tensor
    parent: Tensor
    target: Tensor
    """``t``."""
    has_child: Tensor
    """Whether a child of the parent is active."""
    has_learned_child: Tensor
    """Whether a child that has a latent of its own is active."""


def active_latents(acts: Tensor) -> Active:
    """The non-zero entries of dense activations ``(samples, latents)``."""
    most = max(int((acts != 0).sum(-1).max()), 1) if len(acts) else 1
    latent = acts.abs().topk(most, dim=-1).indices
    return Active(latent, acts.gather(-1, latent))


def cooccurrence(active: Active, pairs: tuple[Tensor, Tensor], shape: tuple[int, int]) -> Tensor:
    """How many of the pairs of each parent fall on a sample where each latent fires.

    Args:
        active: the latents that fire on each sample.
        pairs: sample and parent indices.
        shape: numbers of parents and of latents, the shape of the result.
    """
    counts = torch.zeros(shape[0] * shape[1], dtype=torch.int32)
    for sample, parent in zip(*(index.split(_CHUNK) for index in pairs), strict=True):
        key = parent.unsqueeze(1) * shape[1] + active.latent[sample]
        fired = (active.value[sample] != 0).int()
        counts.index_add_(0, key.flatten(), fired.flatten())
    return counts.view(shape)


def owners(active: Active, firing: tuple[Tensor, Tensor], shape: tuple[int, int]) -> Tensor:
    """The feature that each latent detects with the highest F1 (ties: the first one).

    Args:
        active: the latents that fire on each sample.
        firing: sample and feature indices of the features that fire.
        shape: numbers of features and of latents.
    """
    fires = _firings(active, shape[1])
    occurs = torch.bincount(firing[1], minlength=shape[0]).double()
    best = torch.full((shape[1],), -1.0, dtype=torch.float64)
    owner = torch.zeros(shape[1], dtype=torch.long)
    for first in range(0, shape[0], _FEATURE_CHUNK):
        features = slice(first, min(first + _FEATURE_CHUNK, shape[0]))
        inside = (firing[1] >= features.start) & (firing[1] < features.stop)
        local = (firing[0][inside], firing[1][inside] - first)
        hits = cooccurrence(active, local, (features.stop - first, shape[1]))
        f1 = hits.mul_(2) / (occurs[features].unsqueeze(1) + fires).clamp_(min=1)
        top, index = f1.max(0)
        owner = torch.where(top > best, index + first, owner)
        best = torch.maximum(top, best)
    return owner


def _firings(active: Active, latents: int) -> Tensor:
    return torch.bincount(active.latent[active.value != 0], minlength=latents).double()


def find_main_latents(active: Active, pairs: Pairs, cosine: Tensor, eligible: Tensor) -> Tensor:
    """Boolean ``(parents, latents)``: the best detector of each parent, and its feature splits,
    among the latents that are `eligible`, of the same shape. Of equal ones, the one of the highest
    `cosine`, of that shape as well."""
    shape = (cosine.shape[0], cosine.shape[1])
    parents = torch.arange(shape[0])
    positives = torch.bincount(pairs.parent, minlength=shape[0]).double().unsqueeze(1)
    fires = _firings(active, shape[1])
    main = torch.zeros(shape, dtype=torch.bool)
    best_f1 = torch.zeros(shape[0], dtype=torch.float64)
    is_open = positives.squeeze(1) > 0
    # Of the union of main latents: firings, and firings on samples where the parent is active.
    union_fires, union_hits = torch.zeros_like(positives), torch.zeros_like(positives)
    gain = 0.0
    while is_open.any():
        silent = _silent_pairs(active, pairs, main, is_open)
        hits = cooccurrence(active, silent, shape).add_(union_hits.int())
        together = cooccurrence(active, _firing_pairs(active, main, is_open), shape)
        top, choice = torch.zeros(shape[0], dtype=torch.float64), torch.zeros_like(parents)
        for rows in parents.split(_FEATURE_CHUNK):
            predicted = union_fires[rows] + fires - together[rows]
            f1 = 2 * hits[rows] / (predicted + positives[rows]).clamp(min=1)
            f1.masked_fill_(main[rows] | ~eligible[rows], -1.0)
            top[rows] = f1.max(1).values
            best = f1 == top[rows].unsqueeze(1)
            choice[rows] = cosine[rows].where(best, -torch.inf).argmax(1)
        is_open = is_open & (top > best_f1 + gain)
        chosen = (parents[is_open], choice[is_open])
        main[chosen] = True
        best_f1[is_open] = top[is_open]
        union_fires[is_open, 0] += fires[chosen[1]] - together[chosen]
        union_hits[is_open, 0] = hits[chosen].double()
        gain = SPLIT_GAIN
    return main


def _silent_pairs(
    active: Active, pairs: Pairs, main: Tensor, is_open: Tensor
) -> tuple[Tensor, Tensor]:
    """Pairs of open parents, active themselves, on which none of their main latents fires."""
    chosen: list[Tensor] = []
    for index in torch.arange(len(pairs.parent)).split(_CHUNK):
        sample, parent = pairs.sample[index], pairs.parent[index]
        detected = _fires_among(active, sample, parent, main)
        chosen.append(index[is_open[parent] & ~detected])
    index = torch.cat(chosen)
    return pairs.sample[index], pairs.parent[index]


def _firing_pairs(active: Active, main: Tensor, is_open: Tensor) -> tuple[Tensor, Tensor]:
    """(sample, parent) pairs of open parents, active or not, on which a main latent fires."""
    latent_of, parent_of = (main & is_open.unsqueeze(1)).T.nonzero(as_tuple=True)
    mains_of_latent = torch.bincount(latent_of, minlength=main.shape[1])
    first = mains_of_latent.cumsum(0) - mains_of_latent
    sample, slot = (active.value != 0).nonzero(as_tuple=True)
    latent = active.latent[sample, slot]
    repeats = mains_of_latent[latent]
    within = torch.arange(int(repeats.sum())) - (repeats.cumsum(0) - repeats).repeat_interleave(
        repeats
    )
    parent = parent_of[first[latent].repeat_interleave(repeats) + within]
    # A sample on which two main latents of a parent fire counts once.
    key = (sample.repeat_interleave(repeats) * main.shape[0] + parent).unique()
    return key // main.shape[0], key % main.shape[0]


def _fires_among(active: Active, sample: Tensor, parent: Tensor, main: Tensor) -> Tensor:
    firing = active.value[sample] != 0
    return (main[parent.unsqueeze(1), active.latent[sample]] & firing).any(1)


class PairScores(NamedTuple):
    """The scores of each (sample, parent) pair, each of shape ``(pairs,)``."""

    full: Tensor
    fraction: Tensor
    detected: Tensor
    """Whether a main latent fires."""


def score_pairs(
    active: Active, pairs: Pairs, main: Tensor, projection: Tensor, cosine: Tensor
) -> PairScores:
    """Score every pair.

    Args:
        active: the latents that fire on each sample.
        pairs: where each parent is active.
        main: the main latents of each parent.
        projection: ``<d_j, g_p>``, shape ``(parents, latents)``.
        cosine: ``cos(d_j, g_p)``, of the same shape.
    """
    parts: list[PairScores] = []
    for index in torch.arange(len(pairs.parent)).split(_CHUNK):
        sample, parent, t = pairs.sample[index], pairs.parent[index, None], pairs.target[index]
        latent, value = active.latent[sample], active.value[sample]
        contribution = value * projection[parent, latent]
        is_main, cos = main[parent, latent], value.sign() * cosine[parent, latent]
        main_part = contribution.where(is_main, 0.0).sum(1)
        detected = (is_main & (value != 0)).any(1)

        others = contribution.where(~is_main, 0.0).clamp(min=0)
        eligible = others.where(cos >= ABSORBER_COSINE, 0.0)
        absorbers = eligible.topk(min(MAX_ABSORBERS, eligible.shape[1]), dim=1).values.sum(1)
        taken = torch.minimum(absorbers, t - main_part)
        partial = torch.where(main_part <= 0, 1.0, taken / (taken + main_part))
        untouched = (main_part >= t) | (absorbers < ABSORBED_SHARE * t)
        fraction = torch.where(untouched, 0.0, partial)

        largest = others.where(cos >= FULL_ABSORBER_COSINE, 0.0).max(1).values
        full = ~detected & (largest >= ABSORBED_SHARE * t)
        parts.append(PairScores(full.double(), fraction.double(), detected.double()))
    return PairScores(*(torch.cat(part) for part in zip(*parts, strict=True)))


def mean_by_parent(values: Tensor, parent: Tensor, where: Tensor, n_parents: int) -> Tensor:
    """Mean of the values of each parent over the pairs asked for; NaN where there are none."""
    weight = where.double()
    total = torch.bincount(parent, values * weight, minlength=n_parents)
    return total / torch.bincount(parent, weight, minlength=n_parents)


class Absorption:
    """Absorption of a SAE, batch by batch: `update` with each batch, then `compute`.

    Args:
        decoder: the SAE's decoder, rows of any length, ``(latents, d_in)``.
        feature_vectors: true directions of any length, ``(features, d_in)``.
        children: feature indices of the children of each parent.
        signed: whether activations can be negative, as AbsTopK's: a decoder row and its opposite
            are then one direction.
    """

    def __init__(
        self,
        decoder: Tensor,
        feature_vectors: Tensor,
        children: Mapping[int, Sequence[int]],
        signed: bool = False,
    ) -> None:
        if not children:
            raise ValueError(
                "children is empty: absorption needs at least one parent with children"
            )
        decoder, vectors = (m.detach().cpu().double() for m in (decoder, feature_vectors))
        self._parents = torch.tensor(list(children))
        self._parent_of = torch.full((len(vectors),), -1)
        for position, members in enumerate(children.values()):
            self._parent_of[list(members)] = position
        self._descends = torch.zeros(len(children), len(vectors), dtype=torch.bool)
        for position, parent in enumerate(children):
            self._descends[position, _descendants(parent, children)] = True

        directions = torch.nn.functional.normalize(vectors, dim=1)
        unit_decoder = torch.nn.functional.normalize(decoder, dim=1)
        best_cosine = torch.cat(
            [_unsign(d @ unit_decoder.T, signed).max(1).values for d in directions.split(4096)]
        )
        self._signed = signed
        self._learned = best_cosine > LEARNED_COSINE
        self._length = vectors.norm(dim=1)
        self._projection = (directions[self._parents] @ decoder.T).float()
        self._cosine = (directions[self._parents] @ unit_decoder.T).float()
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._active: list[Active] = []
        self._firing: list[Tensor] = []
        self._pairs: list[Pairs] = []
        self._samples = 0

    def update(self, acts: Tensor, features: Tensor) -> None:
        """Take in a batch.

        Args:
            acts: the SAE's activations, ``(samples, latents)``.
            features: the true features' magnitudes, ``(samples, features)``.
        """
        acts, features = acts.detach().cpu().float(), features.detach().cpu().float()
        sample, feature = (features > 0).nonzero(as_tuple=True)
        self._firing.append(torch.stack([sample + self._samples, feature]))
        is_child = self._parent_of[feature] >= 0
        child = torch.zeros(len(features), len(self._parents), dtype=torch.bool)
        learned = torch.zeros_like(child)
        child[sample[is_child], self._parent_of[feature[is_child]]] = True
        is_child &= self._learned[feature]
        learned[sample[is_child], self._parent_of[feature[is_child]]] = True

        strength = features[:, self._parents]
        where = (strength > 0).nonzero(as_tuple=True)
        target = strength[where] * self._length[self._parents[where[1]]].float()
        self._pairs.append(
            Pairs(where[0] + self._samples, where[1], target, child[where], learned[where])
        )
        self._active.append(active_latents(acts))
        self._samples += len(acts)

    def compute(self) -> AbsorptionScores:
        """The scores over all batches so far."""
        if not self._pairs:
            raise RuntimeError("compute() before update(): there is nothing to measure yet")
        pairs = Pairs(*(torch.cat(part) for part in zip(*self._pairs, strict=True)))
        active = _concatenate(self._active)
        firing = torch.cat(self._firing, dim=1)
        shape = (self._descends.shape[1], self._cosine.shape[1])
        owner = owners(active, (firing[0], firing[1]), shape)
        closeness = _unsign(self._cosine, self._signed)
        main = find_main_latents(active, pairs, closeness, ~self._descends[:, owner])
        scores = score_pairs(active, pairs, main, self._projection, self._cosine)

        def by_parent(values: Tensor, where: Tensor) -> Tensor:
            return mean_by_parent(values, pairs.parent, where, len(self._parents))

        everywhere = torch.ones_like(pairs.has_child)
        full, fraction = (by_parent(v, everywhere) for v in (scores.full, scores.fraction))
        gap = by_parent(scores.detected, ~pairs.has_child) - by_parent(
            scores.detected, pairs.has_child
        )
        children = (self._parent_of >= 0).nonzero().squeeze(1)
        return AbsorptionScores(
            full=full.nanmean().item(),
            fraction=fraction.nanmean().item(),
            recall_gap=gap.nanmean().item(),
            full_learned=by_parent(scores.full, pairs.has_learned_child).nanmean().item(),
            fraction_learned=by_parent(scores.fraction, pairs.has_learned_child).nanmean().item(),
            parents_learned=self._learned[self._parents].double().mean().item(),
            children_learned=self._learned[children].double().mean().item(),
            full_by_parent=full,
            fraction_by_parent=fraction,
            main_latents=main,
        )


def _unsign(cosine: Tensor, signed: bool) -> Tensor:
    return cosine.abs() if signed else cosine


def _descendants(parent: int, children: Mapping[int, Sequence[int]]) -> list[int]:
    found: list[int] = []
    todo = list(children.get(parent, ()))
    while todo:
        found.append(todo.pop())
        todo.extend(children.get(found[-1], ()))
    return found


def _concatenate(batches: list[Active]) -> Active:
    most = max(batch.latent.shape[1] for batch in batches)
    padded = [
        [torch.nn.functional.pad(part, (0, most - part.shape[1])) for part in batch]
        for batch in batches
    ]
    return Active(*(torch.cat(parts) for parts in zip(*padded, strict=True)))


def absorption(
    acts: Tensor,
    features: Tensor,
    decoder: Tensor,
    feature_vectors: Tensor,
    children: Mapping[int, Sequence[int]],
    signed: bool = False,
) -> AbsorptionScores:
    """`Absorption` of one batch."""
    metric = Absorption(decoder, feature_vectors, children, signed)
    metric.update(acts, features)
    return metric.compute()
