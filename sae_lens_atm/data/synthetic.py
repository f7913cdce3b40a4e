"""Synthetic hierarchies for measuring absorption, in which parents also fire without a child.

In SAELens' own generator (`SyntheticModelConfig.hierarchy`), nearly every active parent has an
active child, because it compensates probabilities. Such a parent is the sum of its children, and
absorbing it is not an error. Here an active node has an active child with probability `coverage`.
"""

from dataclasses import dataclass

import torch
from sae_lens.synthetic import (
    ActivationGenerator,
    FeatureDictionary,
    Hierarchy,
    HierarchyNode,
    SyntheticModel,
    SyntheticModelConfig,
    hierarchy_modifier,
)

_MOST_FEATURES = 2**20
_RANGES: dict[str, tuple[float, float]] = {
    "hidden_dim": (1, 2**24),
    "roots": (1, _MOST_FEATURES),
    "branching": (2, _MOST_FEATURES),
    "depth": (0, 20),
    "lone_features": (0, _MOST_FEATURES),
    "mean_magnitude": (1e-6, 1e6),
    "std_magnitude": (0, 1e6),
    "bias": (0, 1e6),
    "seed": (0, 2**31 - 1),
}


@dataclass(frozen=True)
class HierarchyModelConfig:
    """A forest of features, and single features outside it. The defaults are our "sister A".

    Args:
        hidden_dim: dimensions of the activations.
        roots: number of trees.
        max_root_probability: firing probability of the first root. It decreases geometrically from
            root to root.
        min_root_probability: firing probability of the last root.
        branching: number of children of each node that has children.
        depth: levels below the roots.
        coverage: probability that an active node has an active child.
        mutually_exclusive: whether at most one child of a node is active at a time.
        lone_features: number of features outside the trees.
        lone_probability: firing probability of the lone features.
        mean_magnitude: mean of an active feature's magnitude.
        std_magnitude: standard deviation of an active feature's magnitude.
        bias: norm of the constant that is added to every activation.
        seed: seed of the feature directions.
    """

    hidden_dim: int = 64
    roots: int = 16
    max_root_probability: float = 0.25
    min_root_probability: float = 0.04
    branching: int = 3
    depth: int = 2
    coverage: float = 0.5
    mutually_exclusive: bool = True
    lone_features: int = 48
    lone_probability: float = 0.02
    mean_magnitude: float = 1.0
    std_magnitude: float = 0.3
    bias: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            self._require(name, low <= getattr(self, name) <= high, f"from {low} to {high}")
        for name in ("max_root_probability", "min_root_probability", "lone_probability"):
            self._require(name, 0 < getattr(self, name) <= 1, "in (0, 1]")
        self._require("coverage", 0 < self.coverage < 1, "in (0, 1)")
        ordered = self.min_root_probability <= self.max_root_probability
        self._require("min_root_probability", ordered, "at most max_root_probability")
        if self.num_features > _MOST_FEATURES:
            raise ValueError(
                f"roots, branching, depth and lone_features must make at most {_MOST_FEATURES:,} "
                f"features, got {self.num_features:,}"
            )

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

    @property
    def num_features(self) -> int:
        """The number of features, in the trees and outside."""
        tree = sum(self.branching**level for level in range(self.depth + 1))
        return self.roots * tree + self.lone_features


def build_hierarchy_model(cfg: HierarchyModelConfig, device: str = "cpu") -> SyntheticModel:
    """Return the hierarchy as SAELens' `SyntheticModel`.

    Features are numbered depth first, tree by tree. The lone features come last.
    """
    probabilities: list[float] = []
    # Independent children of this probability leave a node without one with 1 - coverage.
    child_probability = 1 - (1 - cfg.coverage) ** (1 / cfg.branching)

    def grow(probability: float, levels_below: int) -> HierarchyNode:
        index = len(probabilities)
        probabilities.append(probability)
        if levels_below == 0:
            return HierarchyNode(index)
        children = [grow(child_probability, levels_below - 1) for _ in range(cfg.branching)]
        return HierarchyNode(index, children, cfg.mutually_exclusive)

    fall = (cfg.min_root_probability / cfg.max_root_probability) ** (1 / max(cfg.roots - 1, 1))
    roots = [grow(cfg.max_root_probability * fall**i, cfg.depth) for i in range(cfg.roots)]
    probabilities += [cfg.lone_probability] * cfg.lone_features

    hierarchy = Hierarchy(roots, hierarchy_modifier(roots))
    return SyntheticModel(
        SyntheticModelConfig(
            num_features=cfg.num_features,
            hidden_dim=cfg.hidden_dim,
            mean_firing_magnitudes=cfg.mean_magnitude,
            std_firing_magnitudes=cfg.std_magnitude,
            bias=cfg.bias,
            seed=cfg.seed,
        ),
        feature_dict=FeatureDictionary(
            cfg.num_features, cfg.hidden_dim, bias=cfg.bias, device=device, seed=cfg.seed
        ),
        activation_generator=ActivationGenerator(
            cfg.num_features,
            torch.tensor(probabilities),
            mean_firing_magnitudes=cfg.mean_magnitude,
            std_firing_magnitudes=cfg.std_magnitude,
            modify_activations=hierarchy.modifier,
            device=device,
        ),
        hierarchy=hierarchy,
        device=device,
    )


def children_of(hierarchy: Hierarchy) -> dict[int, list[int]]:
    """Return the feature index of every node with children, and the indices of its children."""
    children_by_parent: dict[int, list[int]] = {}
    todo = list(hierarchy.roots)
    while todo:
        node = todo.pop()
        children = [c.feature_index for c in node.children if c.feature_index is not None]
        if children and node.feature_index is not None:
            children_by_parent[node.feature_index] = children
        todo.extend(node.children)
    return dict(sorted(children_by_parent.items()))
