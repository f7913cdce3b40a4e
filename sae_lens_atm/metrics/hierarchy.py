"""The hierarchy score of Tree SAE: is a latent that fires only with another one its child?

Cao, Nhat, Alharbi, Nguyen, Thai: *Tree SAE: Learning Hierarchical Feature Structures in Sparse
Autoencoders*, arXiv:2605.07922, section 5.2. The paper's text was not at hand. This is what the
authors' code (github.com/tue147/tree-sae, `evals/hierarchy.py`) computes for an SAE of any kind:

    S_cov(p, c) = |samples with p and c| / |samples with c|     activation coverage, Eq. 4
    d*_c        = weights of a logistic probe that predicts from the input whether c fires
    S_res(p, c) = min(<d*_c, d_c>, <d*_c, d_p>)                 reconstruction, Eq. 5

Parents p are drawn, with replacement, from the half of the latents that fires most often. The
children of p are the 5 latents c with the largest S_cov(p, c) among those that fire on at least 100
samples. A pair is hierarchical if d_c and d_p are both among the 5 decoder rows with the largest
cosine with d*_c. The score is the share of hierarchical pairs. The paper's SAEs of GPT-2 small have
scores of 0.05 to 0.22 (TopK, Matryoshka) and of 0.48 to 0.74 (Tree SAE).

Different from the code:

- 65,536 samples instead of 1,280,000, and 40 parents instead of 2,000.
- Below 16,384 samples the batches of the probes are smaller than 4096, so that an epoch has four.
- Latents that fire on fewer than 100 samples are left out first. The code leaves them out of the 20
  latents with the largest coverage. With few samples, that would leave none.
- A latent that never fires is no parent, and two latents that never fire together are no pair.
- A latent fires if its activation is not 0; in the code, if it is above 0.001.
- Decoder rows are divided by their lengths; those of the paper have length 1.

Compare scores on the same data and number of samples only. Every parent gets five children, so the
score has a ceiling far below 1. The true features of our "sister A" score 0.27 on 65,536 samples,
and 0.27 of their pairs are a feature and its descendant. On 16,384 samples both are 0.06, as
rarer children are left out. With 200 pairs the standard error is about 0.03, and more if the pairs
of a parent are alike.

Almost all the time is that of the probes: 50 passes over the samples, for at most 200 probes. With
512 dimensions and one thread this takes about 25 s. Memory: the samples in float32, and one
float for each sample and each latent with each probe.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from sae_lens_atm.metrics.probes import train_probes

CHILDREN = 5
"""Children of a parent, at most."""
NEAREST = 5
"""Decoder rows nearest to a probe among which parent and child must be."""
FEWEST_SAMPLES = 2**15
"""Evaluations on fewer samples leave the score out: it is near 0 for all SAEs then."""
MIN_FIRINGS = 100
"""Samples on which a child fires, at least."""
_BATCH, _LEAST_BATCHES, _WEIGHT_DECAY, _SEED = 4096, 4, 1e-6, 0


class HierarchyScore:
    """The share of hierarchical pairs among the parents and children with the largest coverage.

    Call `update` with inputs and activations, then `compute`.

    Args:
        decoder: decoder rows of any length, shape ``(latents, d_in)``.
        samples: number of samples to use: the first ones.
        parents: number of parents that are drawn.
    """

    def __init__(self, decoder: Tensor, samples: int = 2**16, parents: int = 40) -> None:
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        if parents < 1:
            raise ValueError(f"parents must be at least 1, got {parents}")
        self._rows = functional.normalize(decoder.detach().float())
        self._samples, self._parents = samples, parents
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self.seen = 0
        """Number of samples in use."""
        self._inputs: list[Tensor] = []
        self._fired: list[Tensor] = []  # (sample, latent), shape (2, entries)

    @property
    def is_full(self) -> bool:
        """Whether further samples would not be used."""
        return self.seen == self._samples

    def update(self, x: Tensor, acts: Tensor) -> None:
        """Add samples, up to the number of samples to use.

        Args:
            x: inputs of the SAE, shape ``(..., d_in)``.
            acts: their activations, shape ``(..., latents)``.
        """
        expected = (*x.shape[:-1], len(self._rows))
        if x.shape[-1] != self._rows.shape[1] or acts.shape != expected:
            raise ValueError(
                f"inputs have shape {tuple(x.shape)} and activations {tuple(acts.shape)}, they "
                f"must be (..., {self._rows.shape[1]}) and (..., {len(self._rows)})"
            )
        left = self._samples - self.seen
        x, acts = x.detach().flatten(0, -2)[:left], acts.detach().flatten(0, -2)[:left]
        fired = acts.to(self._rows.device).nonzero().T
        fired[0] += self.seen
        self._fired.append(fired)
        self._inputs.append(x.to(self._rows))
        self.seen += len(x)

    def pairs(self) -> list[tuple[int, int]]:
        """Return the parent and the child of each pair. A parent that is drawn twice is twice in
        the list."""
        if not self.seen:
            return []
        sample, latent = torch.cat(self._fired, 1)
        counts = torch.bincount(latent, minlength=len(self._rows))
        often = counts.argsort(descending=True, stable=True)[: max(len(counts) // 2, 1)]
        often = often[counts[often] > 0]
        if not len(often):
            return []
        draws = torch.Generator().manual_seed(_SEED)
        drawn = torch.randint(len(often), (self._parents,), generator=draws)
        children: dict[int, list[int]] = {}
        for parent in often[drawn.unique().to(often.device)].tolist():
            has_parent = torch.zeros(self.seen, dtype=torch.bool, device=sample.device)
            has_parent[sample[latent == parent]] = True
            together = torch.bincount(latent[has_parent[sample]], minlength=len(counts))
            coverage = together / counts.clamp(min=1)
            coverage[counts < MIN_FIRINGS] = 0
            coverage[parent] = 0
            best = coverage.sort(descending=True, stable=True)
            children[parent] = best.indices[:CHILDREN][best.values[:CHILDREN] > 0].tolist()
        parents = often[drawn.to(often.device)].tolist()
        return [(parent, child) for parent in parents for child in children[parent]]

    def compute(self) -> float:
        """Return the share of hierarchical pairs; NaN without pairs. Trains the probes."""
        pairs = self.pairs()
        if not pairs:
            return math.nan
        parent, child = torch.tensor(pairs, device=self._rows.device).T
        children, place = child.unique(return_inverse=True)
        nearest = self._nearest_rows(children)[:, place]
        both = (nearest == parent).any(0) & (nearest == child).any(0)
        return float(both.double().mean())

    def _nearest_rows(self, children: Tensor) -> Tensor:
        """Return the decoder rows nearest to the probe of each child, ``(rows, children)``."""
        sample, latent = torch.cat(self._fired, 1)
        number = torch.full_like(self._rows[:, 0], -1, dtype=torch.long)
        number[children] = torch.arange(len(children), device=number.device)
        is_child = number[latent] >= 0
        target = self._rows.new_zeros(self.seen, len(children))
        target[sample[is_child], number[latent[is_child]]] = 1
        x, draws = torch.cat(self._inputs), torch.Generator().manual_seed(_SEED)
        size = min(_BATCH, max(len(x) // _LEAST_BATCHES, 1))
        probes = train_probes(x, target, draws, batch_size=size, weight_decay=_WEIGHT_DECAY)
        cosines = self._rows @ functional.normalize(probes.weight).T
        return cosines.topk(min(NEAREST, len(cosines)), dim=0).indices
