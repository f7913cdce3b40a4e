"""The words whose first letters are looked at, and the prompts that ask for them.

A word is a token of ASCII letters, which may start with one space, as in SAEBench 0.6.0. Parts of
words, such as " con", therefore count as words.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.metrics.first_letter import PROBE_F1

TEMPLATE = " has the first letter:"
PROMPTS_IN_BATCH = 64
LETTERS = 26
_EXAMPLES = 10
_TRAIN_SHARE = 0.8
_SMALL_VOCABULARY = 8192  # words
_SMALL_BATCH, _BATCH = 128, 4096


@dataclass(frozen=True)
class FirstLetterConfig:
    """Settings for first letters. The defaults of `min_f1` and of the probes are SAEBench's.

    Args:
        words: number of words; None for all of the vocabulary, as in SAEBench. Words with a leading
            space are taken first, as many of each first letter as there are. Of a letter, words in
            lower case come first, among them those with the lowest token id. Tokenizers number
            their tokens from frequent to rare.
        min_f1: a letter counts if the F1 of its probe is above this.
        match_l0: measure every SAE at the same mean L0 on the words. True for the target L0 of the
            comparison, or a number. Of the activations on all words, the largest are kept.
        probe_epochs: training epochs of the letter probes. A small model needs more.
        probe_lr: learning rate of the letter probes.
        sparse_batch_size: batch size of the probes on an SAE's activations. By default SAEBench's
            4096; with fewer than 8192 words 128. In larger batches, 50 epochs have too few steps,
            and the probes choose wrong latents.
        seed: seed of the split of the words, of the prompts, the probes and the resampled words.
    """

    words: int | None = 4000
    min_f1: float = PROBE_F1
    match_l0: bool | float = False
    probe_epochs: int = 50
    probe_lr: float = 1e-2
    sparse_batch_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("words", "probe_epochs", "probe_lr", "sparse_batch_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        if not 0 <= self.min_f1 < 1:
            raise ValueError(f"min_f1 must be at least 0 and below 1, got {self.min_f1!r}")
        if self.match_l0 is not False and not self.match_l0 > 0:
            raise ValueError(f"match_l0 must be true, false or above 0, got {self.match_l0!r}")

    def batch_size_for(self, words: int) -> int:
        """Return the batch size of the probes on an SAE's activations, for a number of words."""
        return self.sparse_batch_size or (_SMALL_BATCH if words < _SMALL_VOCABULARY else _BATCH)


class Split(NamedTuple):
    """The words of a model."""

    train: list[str]
    test: list[str]

    @property
    def hash(self) -> str:
        """Twenty hexadecimal digits that identify the words and their split."""
        text = "\n".join([*self.train, "", *self.test])
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @property
    def by_letter(self) -> list[int]:
        """The number of words with each first letter."""
        letters = [letter_of(word) for word in (*self.train, *self.test)]
        return [letters.count(letter) for letter in range(LETTERS)]


class Prompts(NamedTuple):
    """The prompts of the words. In each, the last line asks for a word's first letter."""

    train: list[str]
    test: list[str]
    asked: list[str]
    """Other prompts of the test words, for absorption."""


def words_of(tokenizer: Any, most: int | None = None) -> list[str]:
    """Return words of the vocabulary, sorted.

    Args:
        tokenizer: the model's tokenizer.
        most: the largest number of words, see `FirstLetterConfig.words`. None for all.

    Returns:
        The words in alphabetical order.
    """
    ids: dict[str, int] = {}
    for token, number in tokenizer.get_vocab().items():
        word = tokenizer.convert_tokens_to_string([token])
        if word.isascii() and word.removeprefix(" ").isalpha():
            ids[word] = min(number, ids.get(word, number))
    by_frequency = sorted(ids, key=lambda word: (word[0] != " ", not word.islower(), ids[word]))
    taken = Counter[tuple[bool, int]]()
    places: dict[str, tuple[bool, int]] = {}
    for word in by_frequency:
        kind = word[0] != " ", letter_of(word)
        places[word] = kind[0], taken[kind]
        taken[kind] += 1
    return sorted(sorted(by_frequency, key=lambda word: places[word])[:most])


def letter_of(word: str) -> int:
    """Return the index of a word's first letter: 0 for A, 25 for Z."""
    return ord(word.strip()[0].lower()) - ord("a")


def prompt(word: str, examples: Sequence[str], randomness: random.Random) -> str:
    """Return a prompt that asks for a word's first letter, after ten answered examples."""
    shown = randomness.sample(examples, _EXAMPLES)
    while word in shown:
        shown = randomness.sample(examples, _EXAMPLES)
    answered = (f"{w}{TEMPLATE} {w.strip()[0].upper()}" for w in shown)
    return "".join(f"\n{line}" for line in [*answered, f"{word}{TEMPLATE}"])


def split_and_prompts(tokenizer: Any, most: int | None, seed: int) -> tuple[Split, Prompts]:
    """Split the words into training and test words, and write their prompts.

    Args:
        tokenizer: the model's tokenizer.
        most: the largest number of words.
        seed: seed of the split and of the examples in the prompts.

    Raises:
        SettingsError: there are too few words.
    """
    randomness = random.Random(seed)
    every = words_of(tokenizer, most)
    shuffled = randomness.sample(every, len(every))
    size = int(_TRAIN_SHARE * len(every))
    split = Split(shuffled[:size], shuffled[size:])
    if len(split.test) <= _EXAMPLES:
        raise SettingsError(
            f"first_letters: there are {len(every)} words of ASCII letters, too few for prompts "
            f"with {_EXAMPLES} examples"
        )

    def prompts(words: Sequence[str], examples: Sequence[str]) -> list[str]:
        return [prompt(word, examples, randomness) for word in words]

    train = prompts(split.train, split.train)
    test = prompts(split.test, split.test)
    return split, Prompts(train, test, prompts(split.test, every))
