"""Architectures of other papers, as entries of run and comparison files.

Each is a module of this folder with the name of its architecture. The module is imported only if a
file names the architecture, and then registers it with SAELens.
"""

from importlib import import_module
from typing import Any

from sae_lens import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

BASELINES = (
    "archetypal",
    "balanced_matryoshka",
    "hierarchical_topk",
    "itda",
    "kronsae",
    "lista_matryoshka",
    "ortsae",
    "top_afa",
    "tree_sae",
)


def training_class(
    architecture: str,
) -> tuple[type[TrainingSAE[Any]], type[TrainingSAEConfig]] | None:
    """Return the classes that train an architecture, or None if there is no such architecture."""
    _import(architecture)
    return SAE_TRAINING_CLASS_REGISTRY.get(architecture)


def inference_class(architecture: str) -> tuple[type[SAE[Any]], type[SAEConfig]] | None:
    """Return the classes of a saved architecture, or None if there is no such architecture."""
    _import(architecture)
    return SAE_CLASS_REGISTRY.get(architecture)


def training_names() -> list[str]:
    """Return the names of all architectures that can be trained."""
    return sorted({*SAE_TRAINING_CLASS_REGISTRY, *BASELINES})


def _import(architecture: str) -> None:
    if architecture in BASELINES and architecture not in SAE_TRAINING_CLASS_REGISTRY:
        import_module(f"{__name__}.{architecture}")
