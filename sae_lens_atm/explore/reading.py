"""One pass of SAEs over tokens: which latents fire on which tokens, and the latents' averages.

Everything else on the page is computed from the result, without a second pass.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens import SAE
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from sae_lens_atm.evaluation.synthetic import decoder_of_activations
from sae_lens_atm.method.importance import Signals, batch_signals
from sae_lens_atm.training.phases import OnPhase, Phase

MOST_FIRINGS = 50_000_000
"""Number of activations above 0 of an SAE at which the reading ends: 600 MB."""

Sparse = Any
"""A sparse matrix of scipy, whose types say little."""
LONGEST = 8.0
"""A token of a text is left out if its activation is so many times as long as the median one."""


class Tokens(NamedTuple):
    """Tokens in their contexts, and their activations in a language model."""

    ids: NDArray[np.int32]
    """The tokens, shape ``(contexts, context_size)``."""
    rows: int
    """Number of tokens whose activations are read."""
    batches: Iterator[tuple[NDArray[Any], Tensor]]
    """Places of some tokens in the flattened `ids`, ascending, and their activations."""


class Reading(NamedTuple):
    """What an SAE does on the tokens that were read."""

    places: NDArray[Any]
    """Places of the tokens that were read in the flattened ids, shape ``(rows,)``, ascending."""
    acts: Sparse
    """Activations, shape ``(rows, d_sae)``, without those below 0."""
    decoder: Tensor
    """The rows that the activations multiply, float32, shape ``(d_sae, d_in)``."""
    signals: Signals
    """Means over the tokens."""
    inputs: Tensor
    """``E[a_j x]``, shape ``(d_sae, d_in)``."""
    mean_input: Tensor
    """``E[x]``, shape ``(d_in,)``."""
    variance: float
    """Mean squared distance of the activations from their mean."""
    explained_variance: float
    is_signed: bool
    """Whether the SAE has activations below 0, which are left out."""
    left_out: int
    """Number of tokens that were left out, see `LONGEST`."""

    @property
    def rows(self) -> int:
        """Number of tokens."""
        return len(self.places)

    @property
    def l0(self) -> float:
        """Mean number of latents that fire on a token."""
        return self.acts.nnz / max(self.rows, 1)

    def column(self, latent: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the rows on which a latent fires, ascending, and its activations there."""
        part = slice(self.acts.indptr[latent], self.acts.indptr[latent + 1])
        return self.acts.indices[part], self.acts.data[part]

    def columns(self, latents: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return `column` of several latents, joined, and where each starts (and the last ends)."""
        pointers = self.acts.indptr
        part = np.concatenate([np.arange(pointers[j], pointers[j + 1]) for j in latents])
        starts = np.cumsum([0, *(pointers[j + 1] - pointers[j] for j in latents)])
        return self.acts.indices[part], self.acts.data[part], starts


class _Reader:
    """Collects the activations of one SAE."""

    def __init__(self, sae: SAE[Any]) -> None:
        if getattr(sae, "hook_z_reshaping_mode", False):  # the activations come without heads
            sae.turn_off_forward_pass_hook_z_reshaping()
        self.sae = sae.eval()
        self.decoder = decoder_of_activations(sae).detach().cpu()
        d_sae, d_in = self.decoder.shape
        self.firings, self.is_signed = 0, False
        self._parts: list[Sparse] = []
        self._signals = torch.zeros(len(Signals._fields), d_sae, dtype=torch.float64)
        self._inputs = np.zeros((d_sae, d_in))
        self._error = 0.0

    def add(self, x: Tensor) -> None:
        inputs = x.to(self.sae.device, self.sae.dtype)
        acts = self.sae.encode(inputs)
        residual = x - self.sae.decode(acts).cpu().float()
        acts = acts.to_dense().cpu().float()
        self.is_signed |= bool((acts < 0).any())
        signals = batch_signals(acts, self.decoder, residual)
        self._signals += len(x) * torch.stack(list(signals)).double()
        self._error += float(residual.double().square().sum())
        part: Sparse = csr_matrix(acts.clamp(min=0).numpy())
        self._inputs += part.T @ x.numpy()
        self.firings += part.nnz
        self._parts.append(part)

    def finish(
        self, places: NDArray[Any], mean_input: Tensor, variance: float, left_out: int
    ) -> Reading:
        rows = max(len(places), 1)
        return Reading(
            places=places,
            acts=vstack(self._parts, format="csc"),
            decoder=self.decoder,
            signals=Signals(*(self._signals / rows).float()),
            inputs=torch.from_numpy(self._inputs / rows).float(),
            mean_input=mean_input,
            variance=variance / rows,
            explained_variance=1 - self._error / variance if variance else float("nan"),
            is_signed=self.is_signed,
            left_out=left_out,
        )


@torch.no_grad()
def read_tokens(
    saes: Sequence[SAE[Any]],
    tokens: Tokens,
    on_phase: OnPhase,
    longest: float | None = LONGEST,
) -> list[Reading]:
    """Read tokens once, for all SAEs.

    The reading ends early if an SAE has `MOST_FIRINGS` activations above 0. `Reading.rows` says how
    many tokens were read.

    Args:
        saes: the SAEs, all trained at the hook of the activations.
        tokens: the tokens.
        on_phase: is called before each batch.
        longest: see `LONGEST`; None reads all tokens. Such activations are at the first tokens of
            some contexts. They would dominate means, maxima and the search for parents. The median
            is taken over the first batch.
    """
    readers = [_Reader(sae) for sae in saes]
    places: list[NDArray[Any]] = []
    done, total, squares, left_out, most = 0, torch.zeros(()), 0.0, 0, float("inf")
    for rows, x in tokens.batches:
        on_phase(Phase("reading tokens", done, tokens.rows, "tokens"))
        x = x.float().cpu()
        length = x.norm(dim=-1)
        if longest is not None and not places:
            most = longest * float(length.median())
        keep = length <= most
        left_out += len(x) - int(keep.sum())
        rows, x = rows[keep.numpy()], x[keep]
        for reader in readers:
            reader.add(x)
        places.append(rows)
        done += len(rows)
        total = total + x.double().sum(0)
        squares += float(x.double().square().sum())
        if max(reader.firings for reader in readers) >= MOST_FIRINGS:
            break
    on_phase(Phase("reading tokens", tokens.rows, tokens.rows, "tokens"))
    mean = total / max(done, 1)
    variance = squares - done * float(mean.square().sum())
    where = np.concatenate(places)
    return [reader.finish(where, mean.float(), variance, left_out) for reader in readers]
