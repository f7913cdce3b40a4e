"""Samples of a synthetic model, with their true features in the place of tokens."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens.synthetic import HierarchyNode, SyntheticModel
from sae_lens.util import temporary_seed
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from sae_lens_atm.explore.examples import LEVELS
from sae_lens_atm.explore.promoted import MOST, Promoted
from sae_lens_atm.explore.reading import Sparse, Tokens

_BATCH = 2048
_SEED = 2**31  # far from the seeds of training batches


class Samples(NamedTuple):
    """Samples that are drawn while they are read."""

    tokens: Tokens
    features: list[Sparse]
    """Magnitudes of the true features in each batch that was read, ``(samples, features)``."""


def samples_of(model: SyntheticModel, number: int) -> Samples:
    """Return samples of a synthetic model. They are the same in every call."""
    features: list[Sparse] = []

    def batches() -> Iterator[tuple[NDArray[Any], Tensor]]:
        for start in range(0, number, _BATCH):
            size = min(_BATCH, number - start)
            with temporary_seed(_SEED + start), torch.no_grad():
                x, magnitudes = model.sample_with_features(size)
            features.append(csr_matrix(magnitudes.to_dense().clamp(min=0).cpu().numpy()))
            yield np.arange(start, start + size), x

    ids = np.arange(number, dtype=np.int32)[:, None]  # each sample is a context of its own
    return Samples(Tokens(ids, number, batches()), features)


def feature_names(model: SyntheticModel) -> list[str]:
    """Return a name for each feature: `3.1` is the second child of the root `3`."""
    number = model.cfg.num_features
    names = [f"lone {feature}" for feature in range(number)]

    def name(nodes: Sequence[HierarchyNode], before: str) -> None:
        for place, node in enumerate(nodes):
            own = f"{before}{place}"
            if node.feature_index is not None:
                names[node.feature_index] = own
            name(node.children, f"{own}.")

    if model.hierarchy is None:
        return [f"feature {feature}" for feature in range(number)]
    name(model.hierarchy.roots, "")
    return names


def nearest_features(model: SyntheticModel, decoder: Tensor) -> Promoted:
    """Return the true features with the largest and the lowest cosines to each decoder row."""
    vectors = model.feature_dict.feature_vectors.detach().float().cpu()
    unit = [torch.nn.functional.normalize(rows, dim=-1) for rows in (decoder, vectors)]
    cosine = unit[0] @ unit[1].T
    most = min(MOST, len(vectors))
    high, low = cosine.topk(most, dim=1), cosine.topk(most, dim=1, largest=False)
    return Promoted(
        high.indices.numpy().astype(np.uint32),
        high.values.numpy(),
        low.indices.numpy().astype(np.uint32),
        low.values.numpy(),
    )


def joined(features: Sequence[Sparse]) -> Sparse:
    """Return the features of all samples, ``(samples, features)``."""
    return vstack(features, format="csr")


def sample_contexts(features: Sparse, places: NDArray[Any]) -> Mapping[str, Any]:
    """Return the features of the samples at some places, the largest first, for the scripts."""
    used = np.unique(places).astype(np.int64)
    top = float(features.data.max(initial=0)) or 1.0
    tokens: list[NDArray[np.uint32]] = [np.zeros(0, np.uint32)]
    levels: list[NDArray[np.uint8]] = [np.zeros(0, np.uint8)]
    for row in used.tolist():
        part = slice(features.indptr[row], features.indptr[row + 1])
        order = np.argsort(-features.data[part], kind="stable")
        tokens.append(features.indices[part][order].astype(np.uint32))
        size = features.data[part][order] * (LEVELS / top)
        levels.append(np.ceil(size).clip(1, LEVELS).astype(np.uint8))
    return {
        "rows": used.astype(np.uint32),
        "starts": np.cumsum([0, *map(len, tokens[1:])]).astype(np.uint32),
        "tokens": np.concatenate(tokens),
        "levels": np.concatenate(levels),
    }
