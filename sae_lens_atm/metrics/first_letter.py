"""Feature absorption on a language model: first letters are parents, words are their children.

The definition and constants are those of SAEBench 0.6.0. It uses the residual stream at the last
token of many words, in prompts that ask for the word's first letter. For each letter ``c`` there is
a linear probe ``w_c`` of that stream.

- Main latents of a letter: the latent with the largest weight in an L1-penalised probe of the
  activations. The next latents are added while each raises the F1 of a logistic regression on them,
  over the test words, by more than 0.03.
- For a test word that the probe classifies correctly, let ``g = w_c / |w_c|`` and ``p = <x, g>``.
  Latent ``j`` contributes ``a_j cos(d_j, g)``. ``m`` is the sum over the main latents. ``t`` is the
  sum of the up to 3 largest contributions of other latents with cosine >= 0.1.
- Fraction: 0 if ``m >= p`` or ``t < 0.4 p``; 1 if ``m <= 0``; else ``u / (u + m)`` with
  ``u = min(t, p - m)``.
- Full: no main latent fires, and the largest contribution of a single latent (cosine >= 0.025) is
  at least ``0.4 p``.

Scores are averaged over the words of a letter, then over the letters whose probe has an F1 above
0.6. There must be 20 such letters. The scores are also averaged over those of these letters with a
latent whose own F1 is at least 0.5. Without such a latent the main latents are chosen by chance.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sae_lens_atm.metrics.absorption import (
    ABSORBED_SHARE,
    ABSORBER_COSINE,
    FULL_ABSORBER_COSINE,
    MAX_ABSORBERS,
)
from sae_lens_atm.metrics.detectors import SPLIT_GAIN
from sae_lens_atm.metrics.probes import Probe, Words, f1_scores, nested_logistic, train_probe

MAX_SPLITS = 10
PROBE_F1 = 0.6
MIN_LETTERS = 20
LEARNED_F1 = 0.5
PROBED_WITH = (1, 2, 5)
"""Numbers of latents that sparse probing uses."""
_L1 = 0.01
_SILENT = 1e-8


@dataclass(frozen=True)
class FirstLetterScores:
    """The first-letter scores of an SAE. A mean over no values is NaN."""

    full: float
    """Share of words whose letter is fully absorbed; lower is better."""
    fraction: float
    """Mean absorbed fraction; lower is better."""
    full_learned: float
    """`full` over the letters with a latent of their own."""
    fraction_learned: float
    """`fraction` over the same letters."""
    letters_learned: float
    """Share of letters with a latent of their own, among the letters that count."""
    k1_f1: float
    """Mean F1 of the best latent of each letter."""
    splits: float
    """Mean number of main latents."""
    sparse_probing: dict[int, float]
    """Mean balanced accuracy of a classifier on the k best latents of a letter, by k."""
    fraction_by_letter: Tensor
    """`fraction` of each letter, shape ``(26,)``; NaN for a letter that does not count."""
    main_latents: Tensor
    """True for the main latents of each letter, shape ``(26, latents)``."""


def splits_of(f1: Tensor) -> Tensor:
    """Return the number of main latents, from the F1 of the best 1, 2, ... ``(letters, k)``."""
    best, count = f1[:, 0].clone(), torch.ones_like(f1[:, 0], dtype=torch.long)
    going = torch.ones_like(best, dtype=torch.bool)
    for column in f1.T[1:]:
        going &= column > best + SPLIT_GAIN
        best = torch.where(going, column, best)
        count += going
    return count


def absorbed(
    acts: Tensor, explained: Tensor, cosine: Tensor, main: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the absorbed fraction of each word of a letter, and whether it is fully absorbed.

    Args:
        acts: activations, shape ``(words, latents)``.
        explained: ``p``, shape ``(words,)``.
        cosine: cosine of decoder rows with the letter's direction, shape ``(latents,)``.
        main: true for main latents, shape ``(latents,)``.
    """
    contribution = acts * cosine
    by_main = contribution[:, main].sum(-1)
    others = contribution * (~main & (cosine >= ABSORBER_COSINE))
    most = min(MAX_ABSORBERS, acts.shape[1])
    by_others = others.clamp(min=0).topk(most, dim=-1).values.sum(-1)
    carried = torch.minimum(by_others, explained - by_main)
    fraction = (carried / (carried + by_main)).clamp(0, 1)
    fraction = fraction.where(by_main > 0, 1.0)
    fraction = fraction.masked_fill(
        (by_main >= explained) | (by_others < ABSORBED_SHARE * explained) | (explained <= 0), 0.0
    )
    largest, latent = contribution.max(-1)
    full = (acts[:, main] < _SILENT).all(-1) & (cosine[latent] >= FULL_ABSORBER_COSINE)
    full &= (explained > 0) & (largest >= ABSORBED_SHARE * explained)
    return fraction, full


@torch.no_grad()
def first_letter_scores(
    train: Words,
    test: Words,
    right: Tensor,
    asked: Tensor,
    inputs: Tensor,
    decoder: Tensor,
    probe: Probe,
    counts: Tensor,
    generator: torch.Generator,
    batch_size: int = 4096,
) -> FirstLetterScores:
    """Compute the scores of one SAE.

    Args:
        train: activations on the words that the sparse probes are trained on.
        test: activations on the test words.
        right: true for the test words that the letter's probe classifies correctly.
        asked: activations on the test words in the prompts that measure absorption.
        inputs: the residual stream in those prompts.
        decoder: ``W_dec``.
        probe: the letters' probes of the residual stream.
        counts: true for the letters that count, shape ``(26,)``.
        generator: random numbers for the start and the batches of the sparse probes.
        batch_size: batch size of the sparse probes. With SAEBench's 4096 and few words they take
            too few steps and select the wrong latents.
    """
    letters = len(probe.weight)
    is_letter = functional.one_hot(test.letter, letters).bool()
    was_letter = functional.one_hot(train.letter, letters).bool()
    known = was_letter.any(0).nonzero().squeeze(1).tolist()
    sparse = train_probe(
        train,
        generator,
        letters=letters,
        batch_size=batch_size,
        weight_decay=1e-6,
        l1=_L1,
    )
    most = min(MAX_SPLITS, train.x.shape[1])
    order = sparse.weight.topk(most, dim=-1).indices
    f1 = torch.zeros(letters, most, dtype=torch.float64, device=train.x.device)
    for letter in known:
        weights, biases = nested_logistic(train.x[:, order[letter]], was_letter[:, letter])
        yes = test.x[:, order[letter]].double() @ weights.T + biases > 0
        f1[letter] = f1_scores(yes, is_letter[:, letter : letter + 1])
    splits = splits_of(f1)
    main = torch.zeros(letters, train.x.shape[1], dtype=torch.bool, device=train.x.device)
    for letter in range(letters):
        main[letter, order[letter, : splits[letter]]] = True

    direction = functional.normalize(probe.weight.float(), dim=-1)
    cosine = functional.normalize(decoder.float(), dim=-1) @ direction.T
    fraction = torch.full((letters,), math.nan, dtype=torch.float64)
    full = fraction.clone()
    for letter in counts.nonzero().squeeze(1).tolist():
        words = right & is_letter[:, letter]
        if not words.any():
            continue
        shares, whole = absorbed(
            asked[words].float(),
            inputs[words].float() @ direction[letter],
            cosine[:, letter],
            main[letter],
        )
        fraction[letter], full[letter] = shares.mean().item(), whole.double().mean().item()
    counts = counts.cpu() & fraction.isfinite()
    learned = counts & (f1[:, 0].cpu() >= LEARNED_F1)
    return FirstLetterScores(
        full=_mean(full, counts),
        fraction=_mean(fraction, counts),
        full_learned=_mean(full, learned),
        fraction_learned=_mean(fraction, learned),
        letters_learned=_mean(learned.double(), counts),
        k1_f1=_mean(f1[:, 0].cpu(), counts),
        splits=_mean(splits.double().cpu(), counts),
        sparse_probing=sparse_probing(train, test, counts),
        fraction_by_letter=fraction.where(counts, math.nan),
        main_latents=main.cpu(),
    )


def sparse_probing(train: Words, test: Words, counts: Tensor) -> dict[int, float]:
    """Return the balanced accuracy of logistic regressions on k latents, averaged over letters.

    The latents are those whose mean activation differs most between the words of the letter and the
    other words, as in SAEBench.
    """
    largest = min(max(PROBED_WITH), train.x.shape[1])
    found: dict[int, list[float]] = {k: [] for k in PROBED_WITH if k <= largest}
    for letter in counts.nonzero().squeeze(1).tolist():
        was, now = train.letter == letter, test.letter == letter
        gap = train.x[was].mean(0) - train.x[~was].mean(0)
        latents = gap.abs().topk(largest).indices
        weights, biases = nested_logistic(train.x[:, latents], was)
        yes = test.x[:, latents].double() @ weights.T + biases > 0
        accuracy = (yes[now].double().mean(0) + (~yes[~now]).double().mean(0)) / 2
        for k, values in found.items():
            values.append(accuracy[k - 1].item())
    return {k: sum(values) / len(values) if values else math.nan for k, values in found.items()}


def _mean(values: Tensor, chosen: Tensor) -> float:
    return values[chosen].mean().item() if chosen.any() else math.nan
