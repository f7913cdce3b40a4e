"""Feature absorption on a language model: first letters as parents, words as their children.

This is SAEBench 0.6.0's definition with its constants. What it needs is a residual stream at the
last token of many words, in prompts that ask for the word's first letter, and for each letter ``c``
a linear probe ``w_c`` of that stream.

- Main latents of a letter: those of largest weight in an L1-penalised probe of the activations, one
  of them, and another as long as it raises the F1 of a logistic regression on them, over the test
  words, by more than 0.03.
- On a test word that the probe gets right, with ``g = w_c / |w_c|``, ``p = <x, g>`` is to be
  explained, and latent ``j`` contributes ``a_j cos(d_j, g)``. ``m`` is the sum over the main
  latents, ``t`` that of the up to 3 largest contributions of others with cosine >= 0.1.
- Fraction: 0 if ``m >= p`` or ``t < 0.4 p``; 1 if ``m <= 0``; else, with ``u = min(t, p - m)``,
  ``u / (u + m)``.
- Full: no main latent fires, and the largest contribution of a single latent (cosine >= 0.025) is
  at least ``0.4 p``.

Scores are averaged over the words of a letter, then over letters whose probe has an F1 above 0.6,
of which there must be 20. Beside that, over those of them of which one latent alone reaches an F1
of 0.5: where a letter has no latent, its "main" latents are chance, and so is the score.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sae_lens_atm.metrics.absorption import (
    ABSORBED_SHARE,
    ABSORBER_COSINE,
    FULL_ABSORBER_COSINE,
    MAX_ABSORBERS,
    SPLIT_GAIN,
)

MAX_SPLITS = 10
PROBE_F1 = 0.6
MIN_LETTERS = 20
LEARNED_F1 = 0.5
PROBED_WITH = (1, 2, 5)
"""Latents that sparse probing may use."""
_L1 = 0.01
_SILENT = 1e-8
_NEWTON_STEPS = 50


class Words(NamedTuple):
    """Words as vectors: inputs of a SAE, or its activations."""

    x: Tensor
    """``(words, width)``."""
    letter: Tensor
    """0 to 25."""


class Probe(NamedTuple):
    """Linear probes, one for each letter."""

    weight: Tensor
    """``(letters, width)``."""
    bias: Tensor

    def score(self, x: Tensor) -> Tensor:
        """Above 0 for a yes, ``(words, letters)``."""
        return x @ self.weight.T + self.bias


@dataclass(frozen=True)
class FirstLetterScores:
    """What a SAE makes of the first letters. A mean over nothing is NaN."""

    full: float
    """Share of words on which their letter is fully absorbed; lower is better."""
    fraction: float
    """Mean absorbed fraction; lower is better."""
    full_learned: float
    """`full`, over the letters that have a latent of their own."""
    fraction_learned: float
    """`fraction`, over those letters."""
    letters_learned: float
    """Their share among the letters that count."""
    k1_f1: float
    """Mean F1 of a letter's one best latent."""
    splits: float
    """Mean number of main latents."""
    sparse_probing: dict[int, float]
    """Mean balanced accuracy of telling a letter by its k best latents, by k."""
    fraction_by_letter: Tensor
    """NaN for a letter that does not count, ``(26,)``."""
    main_latents: Tensor
    """Which latents are main latents of which letter: boolean, ``(26, latents)``."""


def train_probe(
    words: Words,
    generator: torch.Generator,
    *,
    letters: int = 26,
    epochs: int = 50,
    batch_size: int = 64,
    lr: float = 1e-2,
    weight_decay: float = 1e-4,
    l1: float = 0.0,
) -> Probe:
    """SAEBench's probes: one against the rest, positives weighted by their rarity, Adam with a
    learning rate that falls to 1e-5 from epoch to epoch."""
    x, target = words.x, functional.one_hot(words.letter, letters).to(words.x.dtype)
    positives = target.sum(0)
    rarity = (len(x) - positives) / positives.clamp(min=1)
    bound = 1 / math.sqrt(x.shape[1])  # as torch.nn.Linear starts
    probe = Probe(
        torch.empty(letters, x.shape[1]).uniform_(-bound, bound, generator=generator).to(x),
        torch.empty(letters).uniform_(-bound, bound, generator=generator).to(x),
    )
    for parameter in probe:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam([*probe], lr, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, (1e-5 / lr) ** (1 / epochs))
    with torch.enable_grad():
        for _ in range(epochs):
            for batch in torch.randperm(len(x), generator=generator).split(batch_size):
                loss = functional.binary_cross_entropy_with_logits(
                    probe.score(x[batch]), target[batch], pos_weight=rarity
                )
                if l1:
                    loss = loss + l1 * probe.weight.abs().sum(-1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scheduler.step()
    return Probe(*(parameter.detach() for parameter in probe))


def f1_scores(predicted: Tensor, true: Tensor) -> Tensor:
    """F1 along the first dimension; 0 where there is nothing to find and nothing found."""
    hits = (predicted & true).sum(0).double()
    return 2 * hits / (predicted.sum(0) + true.sum(0)).clamp(min=1)


def nested_logistic(x: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Logistic regressions on the first column alone, on the first two, and so on.

    Of each, the minimum of ``|w|^2 / 2 + sum_i s_i log(1 + exp(-y_i (<w, x_i> + b)))``, with
    ``s_i`` such that both classes weigh the same: scikit-learn's, `class_weight="balanced"`. By
    Newton's method, all at once.

    Args:
        x: ``(words, k)``.
        true: boolean, ``(words,)``; both must occur.

    Returns:
        Weights ``(k, k)``, of which row ``i`` has ``i + 1`` that are not 0, and biases ``(k,)``.
    """
    size = x.shape[1]
    x = torch.cat([x.double(), torch.ones_like(x[:, :1], dtype=torch.float64)], 1)
    used = torch.ones(size, size, dtype=torch.float64, device=x.device).tril()
    used = functional.pad(used, (0, 1), value=1.0)  # the bias
    ridge = functional.pad(torch.ones(size, dtype=torch.float64, device=x.device), (0, 1))
    share = true.double().mean()
    weight = torch.where(true, 0.5 / share, 0.5 / (1 - share))
    sign = torch.where(true, 1.0, -1.0).double()

    def loss(w: Tensor) -> Tensor:
        misfit = functional.softplus(-sign[:, None] * (x @ w.T))
        return (w.square() * ridge).sum(-1) / 2 + (weight[:, None] * misfit).sum(0)

    w = torch.zeros(size, size + 1, dtype=torch.float64, device=x.device)
    for _ in range(_NEWTON_STEPS):
        p = (x @ w.T).sigmoid()
        gradient = ((weight[:, None] * (p - true[:, None].double())).T @ x + w * ridge) * used
        curvature = weight[:, None] * p * (1 - p)
        hessian = torch.einsum("nk,ni,nj->kij", curvature, x, x) * used[:, None] * used[:, :, None]
        # What a regression does not use stays at 0; a saturated one may have no curvature left.
        hessian = hessian + torch.diag_embed(torch.maximum(ridge, 1 - used) + 1e-9)
        step = torch.linalg.solve(hessian, gradient)
        before, length = loss(w), torch.ones_like(w[:, :1])
        for _ in range(20):
            worse = loss(w - length * step) > before
            if not worse.any():
                break
            length = torch.where(worse[:, None], length / 2, length)
        w = w - length * step
        if step.abs().max() < 1e-8:
            break
    return w[:, :-1], w[:, -1]


def splits_of(f1: Tensor) -> Tensor:
    """How many latents are main latents, from the F1 of the best 1, 2, ... ``(letters, k)``."""
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
    """Absorbed fraction of each word of one letter, and whether it is fully absorbed.

    Args:
        acts: activations ``(words, latents)``.
        explained: ``p``, ``(words,)``.
        cosine: of each latent's decoder row with the letter's direction, ``(latents,)``.
        main: which are main latents, boolean ``(latents,)``.
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
    """The scores of one SAE.

    Args:
        train: activations of the SAE on the words that probes are trained on.
        test: activations on the others.
        right: which test words the letter's probe gets right.
        asked: activations on the test words in the prompts of the absorption itself.
        inputs: the residual stream in those prompts.
        decoder: ``W_dec``.
        probe: the letters' probes of the residual stream.
        counts: which letters count, boolean ``(26,)``.
        generator: for the sparse probes' start and the order of their batches.
        batch_size: of the sparse probes' training. SAEBench's 4096 leaves few steps where there are
            few words; then they pick the wrong latents.
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
    """Balanced accuracy of logistic regressions on the k latents whose mean activation differs most
    between the words of a letter and the others (SAEBench's choice), averaged over letters."""
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
