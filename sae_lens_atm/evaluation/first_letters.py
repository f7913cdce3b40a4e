"""Absorption of first letters: words, prompts and probes of a language model, scores of an SAE.

Words, prompts and probes are those of SAEBench 0.6.0, but every random choice is seeded. The scores
are computed by `metrics.first_letter`.
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
    """Settings for first letters. The defaults are SAEBench's.

    Args:
        probe_epochs: training epochs of the letter probes. A small model needs more.
        probe_lr: learning rate of the letter probes.
        sparse_batch_size: batch size of the probes on an SAE's activations. With few words, set
            128. In larger batches, 50 epochs have too few steps, and the probes choose wrong
            latents.
        seed: seed of the split of the words, of the prompts and of the probes.
    """

    probe_epochs: int = 50
    probe_lr: float = 1e-2
    sparse_batch_size: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("probe_epochs", "probe_lr", "sparse_batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")


SMALL_MODEL = FirstLetterConfig(probe_epochs=100, probe_lr=5e-2, sparse_batch_size=128)
"""Settings for a model with few words and dimensions."""


class FirstLetters(NamedTuple):
    """The words of a model, their activations, and the letter probes."""

    train: Words
    test: Words
    asked: Tensor
    """Activations of the test words in other prompts, for absorption."""
    probe: Probe
    probe_f1: Tensor
    """F1 of each letter's probe on the test words, shape ``(26,)``."""
    words: tuple[list[str], list[str]]
    """The training words and the test words."""
    cfg: FirstLetterConfig

    @property
    def counts(self) -> Tensor:
        """The letters with a good probe, bool; all false if they are fewer than 20."""
        counts = self.probe_f1 > PROBE_F1
        return counts & (counts.sum() >= MIN_LETTERS)

    @property
    def shares(self) -> Tensor:
        """The share of each letter among the words."""
        every = torch.cat([self.train.letter, self.test.letter])
        return every.bincount(minlength=_LETTERS) / len(every)


def words_of(tokenizer: Any) -> list[str]:
    """Return the vocabulary's words of ASCII letters, sorted. They may start with one space."""
    strings = (tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab())
    plain = {word for word in strings if word.removeprefix(" ").isalpha() and word.isascii()}
    return sorted(plain)


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


@torch.no_grad()
def residual_stream(
    model: Any,
    hook_name: str,
    prompts: Sequence[str],
    model_kwargs: dict[str, Any] | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Return the activations on the last token of the word in question, ``(prompts, d_in)``.

    Args:
        model: the language model.
        hook_name: where the activations are read.
        prompts: the prompts, from `prompt`.
        model_kwargs: more arguments of the forward pass.
        batch_size: prompts in a batch.
    """
    device = next(model.parameters()).device
    bos = model.tokenizer.bos_token_id
    activations: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        texts = list(prompts[start : start + batch_size])
        batch = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [torch.tensor(row if bos is None else [bos, *row]) for row in batch]
        # Padding follows the word, and attention is causal.
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        _, cache = model.run_with_cache(tokens, names_filter=[hook_name], **(model_kwargs or {}))
        at = torch.tensor([len(row) - 1 - _AFTER_THE_WORD for row in rows], device=device)
        stream = cache[hook_name].flatten(2)
        activations.append(stream[torch.arange(len(at), device=device), at].float())
    return torch.cat(activations)


def look_at_first_letters(
    model: Any,
    hook_name: str,
    cfg: FirstLetterConfig,
    model_kwargs: dict[str, Any] | None = None,
) -> FirstLetters:
    """Split the words, compute their activations, and train the letter probes.

    Args:
        model: the language model.
        hook_name: where the activations are read.
        cfg: the settings.
        model_kwargs: more arguments of the forward pass.

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
            f"first_letters: the vocabulary has {len(every)} words of ASCII letters, too few for "
            f"prompts with {_EXAMPLES} examples"
        )

    def streams(words: Sequence[str], examples: Sequence[str]) -> Tensor:
        prompts = [prompt(word, examples, randomness) for word in words]
        return residual_stream(model, hook_name, prompts, model_kwargs)

    def labelled(words: Sequence[str]) -> Words:
        x = streams(words, words)
        return Words(x, torch.tensor([letter_of(word) for word in words], device=x.device))

    training, testing = labelled(train), labelled(test)
    generator = torch.Generator().manual_seed(cfg.seed)
    probe = train_probe(training, generator, epochs=cfg.probe_epochs, lr=cfg.probe_lr)
    is_letter = functional.one_hot(testing.letter, _LETTERS).bool()
    f1 = f1_scores(probe.score(testing.x) > 0, is_letter)
    asked = streams(test, every)
    return FirstLetters(training, testing, asked, probe, f1, (train, test), cfg)


@torch.no_grad()
def scores_of(sae: SAE[Any], letters: FirstLetters) -> FirstLetterScores:
    """Return the scores of an SAE, trained at the hook where the activations were read."""

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
    """Return the figures for the tables of a comparison."""
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
