"""Absorption of first letters: activations and probes of a language model, scores of an SAE.

Words, prompts and probes are those of SAEBench 0.6.0, but every random choice is seeded. The scores
are computed by `metrics.first_letter`. `letter_store` keeps activations and probes on disk.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional
from typing_extensions import Self

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.hooked_reading import ModelHook, activations_at
from sae_lens_atm.evaluation.letter_words import (
    LETTERS,
    PROMPTS_IN_BATCH,
    TEMPLATE,
    FirstLetterConfig,
    Split,
    letter_of,
    split_and_prompts,
)
from sae_lens_atm.evaluation.recovered_loss import OnBatch, ignore_batch
from sae_lens_atm.evaluation.synthetic import decoder_of_activations
from sae_lens_atm.metrics.first_letter import (
    METRIC,
    MIN_LETTERS,
    FirstLetterScores,
    first_letter_scores,
)
from sae_lens_atm.metrics.probes import Probe, Words, f1_scores, train_probes

_LONGEST_TEMPLATE = 30  # tokens

SMALL_MODEL = FirstLetterConfig(probe_epochs=100, probe_lr=5e-2)
"""Settings for a model with few words and dimensions."""


class LetterActivations(NamedTuple):
    """The words of a model and their activations, float32 on the CPU."""

    words: Split
    train: Words
    test: Words
    asked: Tensor
    """Activations of the test words in other prompts, for absorption."""


class FirstLetters(NamedTuple):
    """The words of a model, their activations, and the letter probes."""

    words: Split
    train: Words
    test: Words
    asked: Tensor
    """Activations of the test words in other prompts, for absorption."""
    probe: Probe
    probe_f1: Tensor
    """F1 of each letter's probe on the test words, shape ``(26,)``."""
    cfg: FirstLetterConfig

    @property
    def above(self) -> Tensor:
        """The letters with a good probe, bool, shape ``(26,)``."""
        return self.probe_f1 > self.cfg.min_f1

    @property
    def counts(self) -> Tensor:
        """The letters that count: those with a good probe, or none if these are fewer than 20."""
        return self.above & (self.above.sum() >= MIN_LETTERS)

    @property
    def shares(self) -> Tensor:
        """The share of each letter among the words."""
        number = torch.tensor(self.words.by_letter)
        return number / number.sum()

    def to(self, device: torch.device | str) -> Self:
        """Return the same on another device."""
        return self._replace(
            train=Words(*(part.to(device) for part in self.train)),
            test=Words(*(part.to(device) for part in self.test)),
            asked=self.asked.to(device),
            probe=Probe(*(part.to(device) for part in self.probe)),
            probe_f1=self.probe_f1.to(device),
        )

    def facts(self) -> dict[str, Any]:
        """Return what was measured, for results: words, probes, settings, as plain values."""
        return {
            "metric": METRIC,
            "words": sum(map(len, self.words)),
            "test_words": len(self.words.test),
            "words_hash": self.words.hash,
            "words_by_letter": self.words.by_letter,
            "probe_f1_by_letter": self.probe_f1.tolist(),
            "letters_above": int(self.above.sum()),
            "settings": asdict(self.cfg),
        }


# --- the language model --------------------------------------------------------------------------


@torch.no_grad()
def residual_stream(
    model: Any, hook: ModelHook, prompts: Sequence[str], on_batch: Callable[[], None] | None = None
) -> Tensor:
    """Return the activations on the last token of the word in question, ``(prompts, d_in)``.

    The model runs up to the hook. The result is float32 on the CPU.

    Args:
        model: the language model.
        hook: where the activations are read.
        prompts: the prompts, from `letter_words.prompt`.
        on_batch: is called before each batch.
    """
    bos = model.tokenizer.bos_token_id
    after: int | None = None
    activations: list[Tensor] = []
    for start in range(0, len(prompts), PROMPTS_IN_BATCH):
        if on_batch is not None:
            on_batch()
        texts = list(prompts[start : start + PROMPTS_IN_BATCH])
        batch = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
        after = after or _tokens_of_template(model.tokenizer, batch[0])
        rows = [row if bos is None else [bos, *row] for row in batch]
        here = activations_at(model, hook, rows, [len(row) - 1 - after for row in rows])
        activations.append(here.float())
    return torch.cat(activations)


def _tokens_of_template(tokenizer: Any, prompt_ids: Sequence[int]) -> int:
    """Return the number of tokens at the end of a prompt that follow the word."""

    def letters(text: str) -> str:
        return "".join(text.split())

    for number in range(1, _LONGEST_TEMPLATE):
        if letters(tokenizer.decode(prompt_ids[-number:])) == letters(TEMPLATE):
            return number
    raise SettingsError(
        f"first_letters: the tokenizer does not split a prompt before {TEMPLATE!r}, so the "
        "activations of a word cannot be read"
    )


def read_letter_activations(
    model: Any, hook: ModelHook, cfg: FirstLetterConfig, on_batch: OnBatch = ignore_batch
) -> LetterActivations:
    """Split the words, and compute their activations in the prompts.

    Args:
        model: the language model, with its tokenizer.
        hook: where the activations are read.
        cfg: the settings.
        on_batch: is called before each batch of prompts.

    Raises:
        SettingsError: the vocabulary has too few words.
    """
    words, prompts = split_and_prompts(model.tokenizer, cfg.words, cfg.seed)
    batches = sum(-(-len(part) // PROMPTS_IN_BATCH) for part in prompts)
    done = 0

    def count() -> None:
        nonlocal done
        on_batch(done, batches)
        done += 1

    train, test, asked = (residual_stream(model, hook, part, count) for part in prompts)
    return LetterActivations(
        words, _labelled(train, words.train), _labelled(test, words.test), asked
    )


def _labelled(x: Tensor, words: Sequence[str]) -> Words:
    return Words(x, torch.tensor([letter_of(word) for word in words]))


def train_letter_probes(activations: LetterActivations, cfg: FirstLetterConfig) -> Probe:
    """Train the probes of the letters on the training words."""
    target = functional.one_hot(activations.train.letter, LETTERS)
    draws = torch.Generator().manual_seed(cfg.seed)
    x = activations.train.x
    return train_probes(x, target, draws, epochs=cfg.probe_epochs, lr=cfg.probe_lr)


def with_probes(
    activations: LetterActivations, probe: Probe, cfg: FirstLetterConfig
) -> FirstLetters:
    """Return activations and probes, with the F1 of the probes on the test words."""
    test = activations.test
    is_letter = functional.one_hot(test.letter, LETTERS).bool()
    f1 = f1_scores(probe.score(test.x) > 0, is_letter)
    return FirstLetters(*activations, probe, f1, cfg)


def look_at_first_letters(
    model: Any, hook: ModelHook, cfg: FirstLetterConfig, on_batch: OnBatch = ignore_batch
) -> FirstLetters:
    """Compute the activations of the words, and train the letter probes.

    Args:
        model: the language model, with its tokenizer.
        hook: where the activations are read.
        cfg: the settings.
        on_batch: is called before each batch of prompts.

    Raises:
        SettingsError: the vocabulary has too few words.
    """
    activations = read_letter_activations(model, hook, cfg, on_batch)
    return with_probes(activations, train_letter_probes(activations, cfg), cfg)


# --- an SAE --------------------------------------------------------------------------------------


class LatentsOnWords(NamedTuple):
    """Activations of an SAE's latents on the words, each of shape ``(words, d_sae)``."""

    train: Tensor
    test: Tensor
    asked: Tensor


@torch.no_grad()
def latents_on_words(
    sae: SAE[Any], letters: FirstLetters, target_l0: float | None = None
) -> LatentsOnWords:
    """Encode the words. With `match_l0`, keep only the largest activations.

    Args:
        sae: the SAE, trained at the hook where the activations were read. Its activations are
            multiplied by the lengths of the decoder rows that they belong to, since the definition
            of absorption assumes rows of unit length.
        letters: words, activations and probes.
        target_l0: the L0 that the SAE was trained for. Only `match_l0: true` needs it.

    Raises:
        SettingsError: the settings have `match_l0: true`, and there is no target.
    """
    lengths = decoder_of_activations(sae).norm(dim=-1)

    def acts(x: Tensor) -> Tensor:
        rows = [sae.encode(part.to(sae.device, sae.dtype)).to_dense() for part in x.split(4096)]
        return (torch.cat(rows).float() * lengths).to(x.device)

    found = LatentsOnWords(*(acts(x) for x in (letters.train.x, letters.test.x, letters.asked)))
    l0 = matched_l0(letters.cfg, target_l0)
    if l0 is not None:
        keep_largest(found, l0)
    return found


@torch.no_grad()
def scores_of(
    sae: SAE[Any], letters: FirstLetters, target_l0: float | None = None
) -> FirstLetterScores:
    """Return the scores of an SAE. The arguments are those of `latents_on_words`."""
    acts = latents_on_words(sae, letters, target_l0)
    return first_letter_scores(
        letters.train._replace(x=acts.train),
        letters.test._replace(x=acts.test),
        acts.asked,
        letters.asked,
        sae.W_dec.to(letters.asked),
        letters.probe,
        letters.probe.score(letters.test.x) > 0,
        letters.counts,
        letters.cfg.seed,
        letters.cfg.batch_size_for(sum(map(len, letters.words))),
    )


def matched_l0(cfg: FirstLetterConfig, target_l0: float | None) -> float | None:
    """Return the L0 on the words at which an SAE is measured; None for the SAE's own.

    Raises:
        SettingsError: `match_l0` is true, and there is no target.
    """
    if cfg.match_l0 is False:
        return None
    if cfg.match_l0 is not True:
        return float(cfg.match_l0)
    if target_l0 is None:
        raise SettingsError(
            "first_letters.match_l0 must be a number where SAEs have no target L0, got true"
        )
    return target_l0


def keep_largest(acts: Sequence[Tensor], l0: float) -> None:
    """Set all but the largest activations to 0, in place, so that their mean number is `l0`.

    One threshold is used for all words. An SAE with fewer active latents keeps them all.

    Args:
        acts: activations, each of shape ``(words, latents)``.
        l0: the mean number of active latents on a word.
    """
    sizes = torch.cat([part[part != 0].abs() for part in acts])
    keep = round(l0 * sum(map(len, acts)))
    if keep >= len(sizes):
        return
    threshold = sizes.topk(max(keep, 1)).values[-1]
    for part in acts:
        part[part.abs() < threshold] = 0


def figures_of(scores: FirstLetterScores, letters: FirstLetters) -> dict[str, float]:
    """Return the figures for the tables of a comparison."""
    return {**scores.figures, "letters": int(letters.counts.sum())}
