"""Which latents of an SAE detect which features of a known hierarchy.

All functions work on the active latents of each sample and on (sample, parent) pairs, so that
memory grows with the number of active entries and not with samples times latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SPLIT_GAIN = 0.03
CHUNK = 2**16  # (sample, parent) pairs processed at once
_FEATURE_CHUNK = 512  # features whose F1 with every latent is computed at once


class Active(NamedTuple):
    """The active latents of each sample, padded with zeros to the largest number in a sample."""

    latent: Tensor
    """Latent indices, shape ``(samples, k)``."""
    value: Tensor
    """Their activations, 0 where padded, shape ``(samples, k)``."""


class Pairs(NamedTuple):
    """The (sample, parent) pairs on which a parent is active."""

    sample: Tensor
    parent: Tensor
    target: Tensor
    """``t``, the projection of the parent's contribution on its direction."""
    has_child: Tensor
    """Whether a child of the parent is active."""
    has_learned_child: Tensor
    """Whether a child with a latent of its own is active."""


def active_latents(acts: Tensor) -> Active:
    """Return the nonzero entries of dense activations ``(samples, latents)``."""
    most = max(int((acts != 0).sum(-1).max()), 1) if len(acts) else 1
    latent = acts.abs().topk(most, dim=-1).indices
    return Active(latent, acts.gather(-1, latent))


def cooccurrence(active: Active, pairs: tuple[Tensor, Tensor], shape: tuple[int, int]) -> Tensor:
    """Count the pairs of each parent in which each latent fires, shape ``(parents, latents)``.

    Args:
        active: the latents that fire on each sample.
        pairs: sample and parent indices.
        shape: numbers of parents and of latents, the shape of the result.
    """
    counts = torch.zeros(shape[0] * shape[1], dtype=torch.int32)
    for sample, parent in zip(*(index.split(CHUNK) for index in pairs), strict=True):
        key = parent.unsqueeze(1) * shape[1] + active.latent[sample]
        fired = (active.value[sample] != 0).int()
        counts.index_add_(0, key.flatten(), fired.flatten())
    return counts.view(shape)


def owners(active: Active, firing: tuple[Tensor, Tensor], shape: tuple[int, int]) -> Tensor:
    """Return the feature that each latent detects with the highest F1 (ties: the first).

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
    """Return the main latents of each parent: its best detector and its feature splits.

    Args:
        active: the active latents of each sample.
        pairs: the samples on which each parent is active.
        cosine: decides between latents of equal F1, shape ``(parents, latents)``.
        eligible: the latents to choose from, bool, of the same shape.

    Returns:
        bool, of the same shape.
    """
    shape = (cosine.shape[0], cosine.shape[1])
    parents = torch.arange(shape[0])
    positives = torch.bincount(pairs.parent, minlength=shape[0]).double().unsqueeze(1)
    fires = _firings(active, shape[1])
    main = torch.zeros(shape, dtype=torch.bool)
    best_f1 = torch.zeros(shape[0], dtype=torch.float64)
    is_open = positives.squeeze(1) > 0
    # For the union of main latents: its firings, and those on samples with an active parent.
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
    """Return the pairs of open parents in which none of their main latents fires."""
    chosen: list[Tensor] = []
    for index in torch.arange(len(pairs.parent)).split(CHUNK):
        sample, parent = pairs.sample[index], pairs.parent[index]
        detected = _fires_among(active, sample, parent, main)
        chosen.append(index[is_open[parent] & ~detected])
    index = torch.cat(chosen)
    return pairs.sample[index], pairs.parent[index]


def _firing_pairs(active: Active, main: Tensor, is_open: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sample, parent) for open parents, active or not, with a main latent that fires."""
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


def concatenate(batches: list[Active]) -> Active:
    """Join batches along their samples."""
    most = max(batch.latent.shape[1] for batch in batches)
    padded = [
        [torch.nn.functional.pad(part, (0, most - part.shape[1])) for part in batch]
        for batch in batches
    ]
    return Active(*(torch.cat(parts) for parts in zip(*padded, strict=True)))
