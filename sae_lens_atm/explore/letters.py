"""First letters: the latents that detect each, the words they miss, and what absorbed these."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional

from sae_lens_atm.evaluation.first_letters import FirstLetters, latents_on_words, scores_of
from sae_lens_atm.evaluation.letter_store import first_letters_of
from sae_lens_atm.evaluation.letter_words import FirstLetterConfig
from sae_lens_atm.metrics.first_letter import absorbed
from sae_lens_atm.training.phases import OnPhase, Phase
from sae_lens_atm.training.run_file import LanguageModelRun

MOST_WORDS = 60
"""Number of missed words of a letter on the page."""


class LetterSource(NamedTuple):
    """The settings of first letters, and the folder in which their activations are stored."""

    settings: FirstLetterConfig
    folder: Path | None = None


class MissedWord(NamedTuple):
    """A word of a letter on which no main latent of the letter fires."""

    word: str
    latent: int
    """The other latent that adds most along the letter's direction."""
    share: float
    """What it adds, as a share of the word's length along this direction."""
    absorbed: bool
    """Whether the word is fully absorbed, by the definition of SAEBench."""


class Letter(NamedTuple):
    """What an SAE knows of a letter."""

    letter: str
    probe_f1: float
    latents: list[int]
    """Its main latents, which detect it best."""
    words: int
    """Number of test words of the letter that the probe classifies correctly."""
    missed: int
    """Number of these on which no main latent fires."""
    absorbed: int
    """Number of these that are fully absorbed."""
    fraction: float
    """Mean absorbed fraction of these."""
    missed_words: list[MissedWord]


def read_letters(
    run: LanguageModelRun, source: LetterSource, load: Callable[[], Any], on_phase: OnPhase
) -> FirstLetters:
    """Return words, activations and probes, from disk if they are there."""

    def on_batch(done: int, batches: int) -> None:
        on_phase(Phase("reading first letters", done, batches, "batches"))

    on_phase(Phase("first letters"))
    return first_letters_of(run.runner, source.settings, load, source.folder, on_batch)


@torch.no_grad()
def describe_letters(sae: SAE[Any], letters: FirstLetters) -> list[Letter]:
    """Return what an SAE knows of each letter that counts."""
    scores = scores_of(sae, letters)
    asked = latents_on_words(sae, letters).asked.cpu()
    direction = functional.normalize(letters.probe.weight.float(), dim=-1).cpu()
    cosine = functional.normalize(sae.W_dec.float().cpu(), dim=-1) @ direction.T
    lies_along = letters.asked.float().cpu() @ direction.T
    right = (letters.probe.score(letters.test.x) > 0).cpu()
    of_letter = letters.test.letter.cpu()
    found: list[Letter] = []
    for number in letters.counts.nonzero().squeeze(1).tolist():
        words = (right[:, number] & (of_letter == number)).nonzero().squeeze(1)
        main = scores.main_latents[number]
        fraction, full = absorbed(asked[words], lies_along[words, number], cosine[:, number], main)
        missed = (asked[words][:, main] <= 0).all(-1)
        named = [
            _missed_word(letters.words.test[words[i]], asked[words[i]], cosine[:, number], main)
            for i in missed.nonzero().squeeze(1).tolist()
        ]
        lengths_along = lies_along[words[missed], number].tolist()
        whole = full[missed].tolist()
        shown = [
            one._replace(share=one.share / max(length, 1e-12), absorbed=bool(is_full))
            for one, length, is_full in zip(named, lengths_along, whole, strict=True)
        ]
        shown.sort(key=lambda one: (not one.absorbed, -one.share))
        found.append(
            Letter(
                letter=chr(ord("a") + number),
                probe_f1=float(letters.probe_f1[number]),
                latents=main.nonzero().squeeze(1).tolist(),
                words=len(words),
                missed=int(missed.sum()),
                absorbed=int(full.sum()),
                fraction=float(fraction.mean()) if len(words) else float("nan"),
                missed_words=shown[:MOST_WORDS],
            )
        )
    return found


def _missed_word(word: str, acts: Tensor, cosine: Tensor, main: Tensor) -> MissedWord:
    added = (acts * cosine).masked_fill(main, -torch.inf)
    share, latent = added.max(0)
    return MissedWord(word.strip(), int(latent), float(share), absorbed=False)
