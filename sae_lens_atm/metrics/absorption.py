"""Feature absorption against a known hierarchy of features.

A parent feature is absorbed on a sample if it is active but its latents are silent, because a
latent of one of its children carries the parent's direction. The definition and constants are those
of SAEBench 0.6.0, with the true direction of the parent instead of a probe. One rule is added: a
latent that detects a descendant best is never a main latent of the parent. Without this rule, the
latents that absorb a parent count as its feature splits if each child covers some percent of the
parent's samples. The SAE that absorbs most would then score 0.

Let ``g_p`` be the unit direction of parent ``p``. On a sample on which ``p`` is active, ``t`` is
the projection of its contribution on ``g_p``. Latent ``j`` contributes ``a_j <d_j, g_p>``.

- Main latents: the latent that detects ``p`` with the highest F1 (ties: highest cosine). Further
  latents are added as long as one raises the F1 of the union by more than 0.03 (feature splits).
- Absorbers: up to 3 other latents of cosine >= 0.1 with the largest positive contributions.
- Fraction: 0 if main >= t or absorbers < 0.4 t; 1 if main <= 0; else ``A / (A + main)`` with
  ``A = min(absorbers, t - main)``.
- Full: no main latent fires, and the largest single absorber (cosine >= 0.025) has at least 0.4 t.

Scores are averaged over the samples of a parent, then over parents.

If activations can be negative, a latent writes the direction ``sign(a_j) d_j`` on a sample, and the
cosine of an absorber is ``sign(a_j) cos(d_j, g_p)``. With `signed`, all other cosines are taken
without their sign.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lens_atm.metrics.detectors import (
    CHUNK,
    Active,
    Pairs,
    active_latents,
    concatenate,
    find_main_latents,
    owners,
)

MAX_ABSORBERS = 3
ABSORBER_COSINE = 0.1
FULL_ABSORBER_COSINE = 0.025
ABSORBED_SHARE = 0.4
LEARNED_COSINE = 0.8


@dataclass(frozen=True)
class AbsorptionScores:
    """The result of `Absorption`. Lower is better, except for the shares learned.

    A mean over no values is NaN, for example if no parent was active.
    """

    full: float
    """Mean over parents of the share of samples on which the parent is fully absorbed."""
    fraction: float
    """Mean over parents of the mean absorbed fraction."""
    recall_gap: float
    """Recall of the main latents without an active child, minus recall with one."""
    full_learned: float
    """`full` on samples with an active child that has a latent of its own (cosine > 0.8)."""
    fraction_learned: float
    """`fraction` on the same samples."""
    parents_learned: float
    """Share of parents with a latent of their own (cosine > 0.8)."""
    children_learned: float
    """Share of children with a latent of their own. Children not learned cannot absorb."""
    full_by_parent: Tensor
    """`full` of each parent, shape ``(parents,)``; NaN for a parent that was never active."""
    fraction_by_parent: Tensor
    """`fraction` of each parent, shape ``(parents,)``."""
    main_latents: Tensor
    """True for the main latents of each parent, shape ``(parents, latents)``."""


class PairScores(NamedTuple):
    """The scores of each (sample, parent) pair, each of shape ``(pairs,)``."""

    full: Tensor
    fraction: Tensor
    detected: Tensor
    """1 if a main latent fires, else 0."""


def score_pairs(
    active: Active, pairs: Pairs, main: Tensor, projection: Tensor, cosine: Tensor
) -> PairScores:
    """Compute the scores of every pair.

    Args:
        active: the active latents of each sample.
        pairs: the samples on which each parent is active.
        main: the main latents of each parent.
        projection: ``<d_j, g_p>``, shape ``(parents, latents)``.
        cosine: ``cos(d_j, g_p)``, of the same shape.
    """
    parts: list[PairScores] = []
    for index in torch.arange(len(pairs.parent)).split(CHUNK):
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
    """Return the mean of each parent's values over the pairs in `where`; NaN without any."""
    weight = where.double()
    total = torch.bincount(parent, values * weight, minlength=n_parents)
    return total / torch.bincount(parent, weight, minlength=n_parents)


class Absorption:
    """Absorption of an SAE: call `update` with each batch, then `compute`.

    Args:
        decoder: decoder rows of any length, shape ``(latents, d_in)``.
        feature_vectors: true directions of any length, shape ``(features, d_in)``.
        children: indices of the child features of each parent feature.
        signed: whether activations can be negative, as those of AbsTopK.
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
        _check(decoder, vectors, children)
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
        """Remove all batches."""
        self._active: list[Active] = []
        self._firing: list[Tensor] = []
        self._pairs: list[Pairs] = []
        self._samples = 0

    def update(self, acts: Tensor, features: Tensor) -> None:
        """Add a batch.

        Args:
            acts: activations of the SAE, shape ``(samples, latents)``.
            features: magnitudes of the true features, shape ``(samples, features)``.
        """
        acts, features = acts.detach().cpu().float(), features.detach().cpu().float()
        self._check_batch(acts, features)
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

    def _check_batch(self, acts: Tensor, features: Tensor) -> None:
        widths = self._cosine.shape[1], len(self._length)
        expected = ((len(acts), widths[0]), (len(acts), widths[1]))
        if (tuple(acts.shape), tuple(features.shape)) != expected:
            raise ValueError(
                f"acts has shape {tuple(acts.shape)} and features {tuple(features.shape)}: they "
                f"must be (samples, {widths[0]}) and (samples, {widths[1]})"
            )
        if not (acts.isfinite().all() and features.isfinite().all()):
            raise ValueError("acts or features hold NaN or Inf values: they must be finite")

    def compute(self) -> AbsorptionScores:
        """Return the scores over all batches so far."""
        if not self._pairs:
            raise RuntimeError("compute() needs at least one update() before")
        pairs = Pairs(*(torch.cat(part) for part in zip(*self._pairs, strict=True)))
        active = concatenate(self._active)
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


def _check(decoder: Tensor, vectors: Tensor, children: Mapping[int, Sequence[int]]) -> None:
    if decoder.ndim != 2 or vectors.ndim != 2 or decoder.shape[1] != vectors.shape[1]:
        raise ValueError(
            f"decoder has shape {tuple(decoder.shape)} and feature_vectors "
            f"{tuple(vectors.shape)}: they must be (latents, d_in) and (features, d_in)"
        )
    outside = {i for parent in children for i in (parent, *children[parent])} - {
        *range(len(vectors))
    }
    if outside:
        raise ValueError(
            f"children has the feature {min(outside)}: it must be in [0, {len(vectors)})"
        )
    parent_of: dict[int, int] = {}
    for parent, members in children.items():
        for child in members:
            if parent_of.setdefault(child, parent) != parent:
                raise ValueError(
                    f"children has feature {child} under {parent_of[child]} and under {parent}: a "
                    "feature must have at most one parent"
                )
    for parent in children:
        if parent in _descendants(parent, children):
            raise ValueError(f"children has a cycle: feature {parent} is its own descendant")


def _descendants(parent: int, children: Mapping[int, Sequence[int]]) -> list[int]:
    found: dict[int, None] = {}
    todo = list(children.get(parent, ()))
    while todo:
        child = todo.pop()
        if child not in found:
            found[child] = None
            todo.extend(children.get(child, ()))
    return list(found)


def absorption(
    acts: Tensor,
    features: Tensor,
    decoder: Tensor,
    feature_vectors: Tensor,
    children: Mapping[int, Sequence[int]],
    signed: bool = False,
) -> AbsorptionScores:
    """Return the absorption of one batch, see `Absorption`."""
    metric = Absorption(decoder, feature_vectors, children, signed)
    metric.update(acts, features)
    return metric.compute()
