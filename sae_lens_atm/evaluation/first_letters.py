"""What a language model knows of the first letters of its words, and what a SAE makes of that.

Words, prompts and probes are SAEBench 0.6.0's, with every random choice by a seed. The scores are
those of `metrics.first_letter`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from sae_lens import SAE
from torch import Tensor
from torch.nn import functional

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.metrics.first_letter import (
    MIN_LETTERS,
    PROBE_F1,
    FirstLetterScores,
    first_letter_scores,
)
from sae_lens_atm.metrics.probes import Probe, Words, f1_scores, train_probe

TEMPLATE = " has the first letter:"
_AFTER_THE_WORD = 5  # tokens of the template
_EXAMPLES = 10
_TRAIN_SHARE = 0.8
_LETTERS = 26


@dataclass(frozen=True)
class FirstLetterConfig:
    """How first letters are looked at; the defaults are SAEBench's.

    Args:
        probe_epochs: epochs of the letters' probes; a small model needs more.
        probe_lr: their learning rate.
        sparse_batch_size: batch of the probes of a SAE's activations. With few words take 128: in
            large batches 50 epochs are too few steps, and the wrong latents come out.
        seed: of the split of the words, the prompts, and the probes.
    """

    probe_epochs: int = 50
    probe_lr: float = 1e-2
    sparse_batch_size: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("probe_epochs", "probe_lr", "sparse_batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}: allowed is more than 0")


SMALL_MODEL = FirstLetterConfig(probe_epochs=100, probe_lr=5e-2, sparse_batch_size=128)
"""For a model of few words and dimensions."""


class FirstLetters(NamedTuple):
    """The words of one model, as its residual stream has them."""

    train: Words
    test: Words
    asked: Tensor
    """The test words in other prompts, in which absorption is looked for."""
    probe: Probe
    probe_f1: Tensor
    """On the test words, ``(26,)``."""
    words: tuple[list[str], list[str]]
    """Those to train on, and those to test on."""
    cfg: FirstLetterConfig

    @property
    def counts(self) -> Tensor:
        """The letters that count; none if they are fewer than 20."""
        counts = self.probe_f1 > PROBE_F1
        return counts & (counts.sum() >= MIN_LETTERS)

    @property
    def shares(self) -> Tensor:
        """Of all words, those of each letter."""
        every = torch.cat([self.train.letter, self.test.letter])
        return every.bincount(minlength=_LETTERS) / len(every)


def words_of(tokenizer: Any) -> list[str]:
    """The vocabulary's words in ASCII letters, one leading space allowed, in alphabetical order."""
    strings = (tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab())
    plain = {word for word in strings if word.removeprefix(" ").isalpha() and word.isascii()}
    return sorted(plain)


def letter_of(word: str) -> int:
    """0 for a word in A, up to 25."""
    return ord(word.strip()[0].lower()) - ord("a")


def prompt(word: str, examples: Sequence[str], randomness: random.Random) -> str:
    """The question for a word's first letter, after ten others that are answered."""
    shown = randomness.sample(examples, _EXAMPLES)
    while word in shown:
        shown = randomness.sample(examples, _EXAMPLES)
    answered = (f"{w}{TEMPLATE} {w.strip()[0].upper()}" for w in shown)
    return "".join(f"\n{line}" for line in [*answered, f"{word}{TEMPLATE}"])


@torch.no_grad()
def residual_stream(
    model: Any,
    hook_name: str,
    prompts: Sequence[str],
    model_kwargs: dict[str, Any] | None = None,
    batch_size: int = 64,
) -> Tensor:
    """The residual stream on the last token of the word asked for, ``(prompts, d_in)``."""
    device = next(model.parameters()).device
    bos = model.tokenizer.bos_token_id
    found: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        texts = list(prompts[start : start + batch_size])
        batch = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [torch.tensor(row if bos is None else [bos, *row]) for row in batch]
        # What follows the word it reads does not change it: the model only looks back.
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        _, cache = model.run_with_cache(tokens, names_filter=[hook_name], **(model_kwargs or {}))
        at = torch.tensor([len(row) - 1 - _AFTER_THE_WORD for row in rows], device=device)
        stream = cache[hook_name].flatten(2)
        found.append(stream[torch.arange(len(at), device=device), at].float())
    return torch.cat(found)


def look_at_first_letters(
    model: Any,
    hook_name: str,
    cfg: FirstLetterConfig,
    model_kwargs: dict[str, Any] | None = None,
) -> FirstLetters:
    """Split the words, put the prompts to the model, train the letters' probes.

    Raises:
        SettingsError: the vocabulary has too few words.
    """
    randomness = random.Random(cfg.seed)
    every = words_of(model.tokenizer)
    shuffled = randomness.sample(every, len(every))
    split = int(_TRAIN_SHARE * len(every))
    train, test = shuffled[:split], shuffled[split:]
    if len(test) <= _EXAMPLES:
        raise SettingsError(
            f"first_letters: the vocabulary has {len(every)} words in ASCII letters, "
            f"too few for prompts with {_EXAMPLES} examples"
        )

    def streams(words: Sequence[str], examples: Sequence[str]) -> Tensor:
        prompts = [prompt(word, examples, randomness) for word in words]
        return residual_stream(model, hook_name, prompts, model_kwargs)

    def seen(words: Sequence[str]) -> Words:
        x = streams(words, words)
        return Words(x, torch.tensor([letter_of(word) for word in words], device=x.device))

    training, testing = seen(train), seen(test)
    generator = torch.Generator().manual_seed(cfg.seed)
    probe = train_probe(training, generator, epochs=cfg.probe_epochs, lr=cfg.probe_lr)
    is_letter = functional.one_hot(testing.letter, _LETTERS).bool()
    f1 = f1_scores(probe.score(testing.x) > 0, is_letter)
    asked = streams(test, every)
    return FirstLetters(training, testing, asked, probe, f1, (train, test), cfg)


@torch.no_grad()
def scores_of(sae: SAE[Any], letters: FirstLetters) -> FirstLetterScores:
    """What a SAE makes of the letters of the stream that it was trained on."""

    def acts(x: Tensor) -> Tensor:
        rows = [sae.encode(part.to(sae.device, sae.dtype)).to_dense() for part in x.split(4096)]
        return torch.cat(rows).to(x.device, torch.float32)

    yes = letters.probe.score(letters.test.x) > 0
    return first_letter_scores(
        letters.train._replace(x=acts(letters.train.x)),
        letters.test._replace(x=acts(letters.test.x)),
        yes.gather(1, letters.test.letter[:, None]).squeeze(1),
        acts(letters.asked),
        letters.asked,
        sae.W_dec.to(letters.asked),
        letters.probe,
        letters.counts,
        torch.Generator().manual_seed(letters.cfg.seed),
        letters.cfg.sparse_batch_size,
    )


def figures_of(scores: FirstLetterScores, letters: FirstLetters) -> dict[str, float]:
    """The figures that a comparison reports."""
    return {
        "absorption_full": scores.full,
        "absorption_fraction": scores.fraction,
        "absorption_full_learned": scores.full_learned,
        "absorption_fraction_learned": scores.fraction_learned,
        "parents_learned": scores.letters_learned,
        "probe_f1": letters.probe_f1[letters.counts].mean().item(),
        "letters": int(letters.counts.sum()),
        "k1_f1": scores.k1_f1,
        "feature_splits": scores.splits,
        **{f"sparse_probing_{k}": value for k, value in scores.sparse_probing.items()},
    }
