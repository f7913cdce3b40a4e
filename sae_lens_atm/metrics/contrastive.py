"""The contrastive score of CE-Bench: does a latent tell a story from the opposite story?

Gulko, Peng, Kumar: *CE-Bench: Towards a Reliable Contrastive Evaluation Benchmark of
Interpretability of Sparse Autoencoders*, arXiv:2509.00691, as the authors' code
(github.com/Yusen-Peng/CE-Bench, `ce_bench/CE_Bench_v2.py`) computes it. For a pair of stories:

    V1, V2 = the activations, averaged over all tokens of each story
    d      = |V1 - V2|, one value for each latent
    score  = max over latents of (d - mean(d)) / std(d)

The score of an SAE is the mean over pairs. The README of the code differs: V1 and V2 are jointly
normalised, and the score is the largest difference. No version of the code that we saw does this.
The code is followed.

Most latents fire in neither story, so the score depends on the number of latents ``n``. It is at
most ``(n - 1) / sqrt(n)``, if a single latent differs. Compare SAEs of one size only.

Memory and time are those of the activations of one story.
"""

import math

from torch import Tensor


class ContrastiveScore:
    """The contrastive score. Call `update` with the two stories of each pair, then `compute`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all pairs."""
        self.by_pair: list[float] = []
        """The score of each pair."""

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add a pair of stories.

        Args:
            first: activations of the first story, shape ``(tokens, latents)``.
            second: activations of the second story, with the same latents.
        """
        shapes = tuple(first.shape), tuple(second.shape)
        if first.ndim != 2 or second.ndim != 2 or shapes[0][1] != shapes[1][1]:
            raise ValueError(
                f"activations have shapes {shapes[0]} and {shapes[1]}, they must be (tokens, "
                "latents) with the same latents"
            )
        if not len(first) or not len(second):
            raise ValueError(f"a story must have tokens, got {len(first)} and {len(second)}")
        difference = (first.double().mean(0) - second.double().mean(0)).abs()
        deviation = float(difference.std()) if len(difference) > 1 else 0.0
        largest = float(difference.max() - difference.mean())
        self.by_pair.append(largest / (deviation or 1.0))

    def compute(self) -> float:
        """Return the mean over pairs; NaN without pairs."""
        return math.fsum(self.by_pair) / len(self.by_pair) if self.by_pair else math.nan
