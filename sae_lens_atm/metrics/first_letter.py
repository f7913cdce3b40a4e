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

Where the activations of a latent are mostly negative, its weight counts with the opposite sign.
Cosines are compared by their absolute values. Flipping the signs of a latent's activations and of
its decoder row then changes no score.

`METRIC` names the definition beside the figures. SAEBench 0.4.1 changed the fraction, so fractions
of earlier versions cannot be compared with these. Full absorption can.
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
from sae_lens_atm.metrics.probes import Probe, Words, f1_scores, nested_logistic, train_probes
from sae_lens_atm.metrics.word_figures import (
    LEARNED_F1,
    PROBED_WITH,
    RESAMPLES,
    FoundOnWords,
    Interval,
    intervals_of,
    splits_of,
    word_figures,
)

METRIC = "SAEBench 0.6.0"
"""Whose definition of absorption this is."""
MAX_SPLITS = 10
PROBE_F1 = 0.6
MIN_LETTERS = 20
_L1 = 0.01
_SILENT = 1e-8


@dataclass(frozen=True)
class FirstLetterScores:
    """The first-letter scores of an SAE. A mean over no values is NaN."""

    figures: dict[str, float]
    """The figures of `word_figures`, by name."""
    intervals: dict[str, Interval]
    """The 95% interval of each, over resampled test words."""
    fraction_by_letter: Tensor
    """Absorbed fraction of each letter, shape ``(26,)``; NaN for a letter that does not count."""
    main_latents: Tensor
    """True for the main latents of each letter, shape ``(26, latents)``."""


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
    others = contribution * (~main & (cosine.abs() >= ABSORBER_COSINE))
    most = min(MAX_ABSORBERS, acts.shape[1])
    by_others = others.clamp(min=0).topk(most, dim=-1).values.sum(-1)
    carried = torch.minimum(by_others, explained - by_main)
    fraction = (carried / (carried + by_main)).clamp(0, 1)
    fraction = fraction.where(by_main > 0, 1.0)
    fraction = fraction.masked_fill(
        (by_main >= explained) | (by_others < ABSORBED_SHARE * explained) | (explained <= 0), 0.0
    )
    largest, latent = contribution.max(-1)
    full = (acts[:, main].abs() < _SILENT).all(-1)
    full &= cosine[latent].abs() >= FULL_ABSORBER_COSINE
    full &= (explained > 0) & (largest >= ABSORBED_SHARE * explained)
    return fraction, full


@torch.no_grad()
def first_letter_scores(
    train: Words,
    test: Words,
    asked: Tensor,
    inputs: Tensor,
    decoder: Tensor,
    probe: Probe,
    by_probe: Tensor,
    counts: Tensor,
    seed: int,
    batch_size: int = 4096,
    resamples: int = RESAMPLES,
) -> FirstLetterScores:
    """Compute the scores of one SAE.

    Args:
        train: activations on the words that the sparse probes are trained on.
        test: activations on the test words.
        asked: activations on the test words in the prompts that measure absorption.
        inputs: the residual stream in those prompts.
        decoder: ``W_dec``.
        probe: the letters' probes of the residual stream.
        by_probe: what the probes predict for the test words, bool, shape ``(words, 26)``.
        counts: true for the letters that count, shape ``(26,)``.
        seed: seed of the start and the batches of the sparse probes, and of the resampled words.
        batch_size: batch size of the sparse probes. With SAEBench's 4096 and few words they take
            too few steps and select the wrong latents.
        resamples: number of resamples of the test words.
    """
    letters = len(probe.weight)
    is_letter = functional.one_hot(test.letter, letters).bool()
    sparse = train_probes(
        train.x,
        functional.one_hot(train.letter, letters),
        torch.Generator().manual_seed(seed),
        batch_size=batch_size,
        weight_decay=1e-6,
        l1=_L1,
    )
    most = min(MAX_SPLITS, train.x.shape[1])
    on_letter = functional.one_hot(train.letter, letters).T.to(train.x) @ train.x
    usual = torch.where(on_letter == 0, train.x.sum(0), on_letter)  # the sign of its activations
    evidence = sparse.weight * torch.where(usual < 0, -1.0, 1.0)
    order = evidence.topk(most, dim=-1).indices
    by_best = is_letter.new_zeros(len(test.x), letters, most)
    for letter in train.letter.unique().tolist():
        by_best[:, letter] = _predictions(train, test, letter, order[letter])
    f1 = torch.stack([f1_scores(by_best[:, i], is_letter[:, i : i + 1]) for i in range(letters)])
    main = is_letter.new_zeros(letters, train.x.shape[1])
    for letter, number in enumerate(splits_of(f1).tolist()):
        main[letter, order[letter, :number]] = True

    direction = functional.normalize(probe.weight.float(), dim=-1)
    cosine = functional.normalize(decoder.float(), dim=-1) @ direction.T
    fraction = asked.new_full((len(test.x),), math.nan, dtype=torch.float64)
    full = fraction.clone()
    right = by_probe.gather(1, test.letter[:, None]).squeeze(1)
    for letter in counts.nonzero().squeeze(1).tolist():
        words = right & is_letter[:, letter]
        shares, whole = absorbed(
            asked[words].float(),
            inputs[words].float() @ direction[letter],
            cosine[:, letter],
            main[letter],
        )
        fraction[words], full[words] = shares.double(), whole.double()
    found = FoundOnWords(
        letter=test.letter,
        fraction=fraction,
        full=full,
        active=(asked != 0).sum(-1),
        by_probe=by_probe,
        by_best=by_best,
        by_sparse=_sparse_probing(train, test, counts),
        counts=counts,
        learned=counts & (f1[:, 0] >= LEARNED_F1),
    )
    figures = word_figures(found, torch.ones_like(fraction)[None])
    generator = torch.Generator().manual_seed(seed)
    read = fraction.isfinite().double() @ is_letter.double()
    return FirstLetterScores(
        figures={name: value.item() for name, value in figures.items()},
        intervals=intervals_of(found, generator, resamples),
        fraction_by_letter=(fraction.nan_to_num() @ is_letter.double() / read).cpu(),
        main_latents=main.cpu(),
    )


def _predictions(train: Words, test: Words, letter: int, latents: Tensor) -> Tensor:
    """Return what regressions on the first 1, 2, ... latents predict for the test words."""
    weights, biases = nested_logistic(train.x[:, latents], train.letter == letter)
    return test.x[:, latents].double() @ weights.T + biases > 0


def _sparse_probing(train: Words, test: Words, counts: Tensor) -> Tensor:
    """Return what regressions on k latents predict, bool, ``(words, letters, len(PROBED_WITH))``.

    The latents are those whose mean activation differs most between the words of the letter and the
    other words, as in SAEBench.
    """
    largest = min(max(PROBED_WITH), train.x.shape[1])
    columns = [k - 1 for k in PROBED_WITH if k <= largest]
    predicted = counts.new_zeros(len(test.x), len(counts), len(columns))
    for letter in counts.nonzero().squeeze(1).tolist():
        was = train.letter == letter
        gap = train.x[was].mean(0) - train.x[~was].mean(0)
        latents = gap.abs().topk(largest).indices
        predicted[:, letter] = _predictions(train, test, letter, latents)[:, columns]
    return predicted
