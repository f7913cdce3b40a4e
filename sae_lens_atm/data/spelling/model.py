"""A language model small enough to train here: docstrings, and the first letters of words.

Absorption wants a model that holds, on a word, both the word and its first letter. Half of this
one's text is spelling: the prompts of SAEBench, and words followed by their first letter at once,
without which the model looks letters up only when asked, out of sight of the layer that is looked
at. Noise in its residual stream makes each letter a direction of its own, well apart from the
others; a penalty on the stream's norm keeps it from shouting the noise down.
"""

import json
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens.util import temporary_seed
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from sae_lens_atm.data.spelling.text import QUESTION, Text, text, tokenizer
from sae_lens_atm.errors import SettingsError

HOOK = "transformer.h.0"
"""Where the SAEs look: the residual stream after the first of its layers."""
TOKENS = "tokens"
_DONE = "spelling-lm.json"
_DECAY = 1.0  # strong: what initialisation left in a word's embedding hides its letter
_LETTER_WEIGHT = 100.0  # of the first letters' loss, which noise alone keeps above 0


@dataclass
class SpellingLMConfig:
    """A model and its training; the defaults take about 3 minutes on 2 cores.

    Args:
        seed: of initialisation, batches and noise.
        words_per_letter: words in the vocabulary of each first letter, the most frequent ones; rare
            letters have fewer.
        layers: transformer layers.
        d_model: width of the residual stream.
        heads: attention heads of a layer.
        context_size: tokens of a row, the one that begins it included.
        steps: training steps.
        batch_size: rows of a step, half of them text, half spelling.
        lr: learning rate at its highest.
        noise: standard deviation of the noise after each layer, in each dimension.
        norm_penalty: weight of the residual stream's mean square after each layer.
        dataset_rows: rows of tokens that come with the model, to train SAEs on.
    """

    seed: int = 0
    words_per_letter: int = 160
    layers: int = 2
    d_model: int = 64
    heads: int = 4
    context_size: int = 96
    steps: int = 1000
    batch_size: int = 32
    lr: float = 4e-3
    noise: float = 1.0
    norm_penalty: float = 0.3
    dataset_rows: int = 8192

    def __post_init__(self) -> None:
        whole = (
            "words_per_letter",
            "layers",
            "d_model",
            "heads",
            "steps",
            "batch_size",
            "dataset_rows",
        )
        for name in whole:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}: allowed is 1 or more")
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr!r}: allowed is more than 0")
        for name in ("noise", "norm_penalty"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}: allowed is 0 or more")
        if self.context_size < 16:
            raise ValueError(f"context_size is {self.context_size!r}: allowed is 16 or more")
        if self.d_model % self.heads:
            raise ValueError(
                f"d_model is {self.d_model!r}: allowed is a multiple of heads, {self.heads}"
            )


class Rows:
    """Rows of tokens, half text and half spelling, drawn by a generator."""

    def __init__(self, text: Text, context_size: int, generator: torch.Generator) -> None:
        index = {token: i for i, token in enumerate(text.vocabulary)}
        self.text, self.length, self.generator = text.tokens, context_size - 1, generator
        self.words = torch.tensor([index[word] for word in text.words])
        first = [word[0].upper() for word in text.words]
        # Every letter as often as any other: else those of few words are hardly learned.
        self.weights = 1 / torch.tensor([first.count(letter) for letter in first])
        self.answers = torch.tensor([index[word[0].upper()] for word in text.words])
        self.template = torch.tensor([index[token] for token in QUESTION])
        self.newline = torch.tensor([index["\n"]])

    def draw(self, rows: int) -> tuple[Tensor, Tensor]:
        """Rows, and where in them first letters are given. Each begins with <bos>, token 0; text
        comes first, then spelling."""
        asked, told = rows // 4, rows // 4
        text = self._text(rows - asked - told)
        drawn = [
            (text, torch.zeros_like(text, dtype=torch.bool)),
            self._spelling(asked, self.template),
            self._spelling(told, self.template[:0]),
        ]
        tokens, is_answer = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        return functional.pad(tokens, (1, 0)), functional.pad(is_answer, (1, 0))

    def _text(self, rows: int) -> Tensor:
        start = torch.randint(len(self.text) - self.length, (rows, 1), generator=self.generator)
        return self.text[start + torch.arange(self.length)]

    def _spelling(self, rows: int, between: Tensor) -> tuple[Tensor, Tensor]:
        shape = (rows, -(-self.length // (len(between) + 3)))
        drawn = self.weights.multinomial(shape[0] * shape[1], True, generator=self.generator)
        word = drawn.view(shape)
        parts = [
            self.newline.expand(*shape, 1),
            self.words[word][..., None],
            between.expand(*shape, -1),
            self.answers[word][..., None],
        ]
        tokens = torch.cat(parts, -1)
        is_answer = torch.zeros_like(tokens, dtype=torch.bool)
        is_answer[..., -1] = True
        return tokens.flatten(1)[:, : self.length], is_answer.flatten(1)[:, : self.length]


def make_spelling_lm(
    cfg: SpellingLMConfig, folder: Path, on_step: Callable[[float], None] | None = None
) -> Path:
    """Train the model and save it, with its tokenizer and a dataset of token rows, as
    `from_pretrained` and `load_from_disk` want them. A folder that has it already is left alone.

    Args:
        cfg: what to train.
        folder: where; written to the side first.
        on_step: called with the loss after each step.

    Raises:
        SettingsError: the folder holds something else.
    """
    if is_spelling_lm(cfg, folder):
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"{folder} is not empty: allowed is a new folder, or this very model's")
    material = text(cfg.words_per_letter)
    rows = Rows(material, cfg.context_size, torch.Generator().manual_seed(cfg.seed))
    with temporary_seed(cfg.seed), _one_thread():
        model = _train(cfg, len(material.vocabulary), rows, on_step)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer(material.vocabulary, str(folder)).save_pretrained(partial)
    dataset, _ = rows.draw(cfg.dataset_rows)
    order = torch.randperm(len(dataset), generator=rows.generator)
    Dataset.from_dict({TOKENS: dataset[order].tolist()}).save_to_disk(str(partial / TOKENS))
    (partial / _DONE).write_text(json.dumps(asdict(cfg), indent=2), encoding="utf-8")
    partial.replace(folder)
    return folder


def is_spelling_lm(cfg: SpellingLMConfig, folder: Path) -> bool:
    """Whether a folder has the model of this config."""
    done = folder / _DONE
    return done.is_file() and json.loads(done.read_text(encoding="utf-8")) == asdict(cfg)


@contextmanager
def _one_thread() -> Generator[None]:
    """With more, sums depend on the load of the machine, and the model with them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    cfg: SpellingLMConfig, vocabulary: int, rows: Rows, on_step: Callable[[float], None] | None
) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=cfg.context_size,
            n_embd=cfg.d_model,
            n_layer=cfg.layers,
            n_head=cfg.heads,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            # GPT-2's own suits a width of 768; letters then take long to be learned at all.
            initializer_range=cfg.d_model**-0.5,
            tie_word_embeddings=False,
        )
    )
    squares: list[Tensor] = []

    def disturb(_module: Any, _inputs: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        squares.append(stream.square().mean())
        stream = stream + cfg.noise * torch.randn_like(stream)
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    hooks = [block.register_forward_hook(disturb) for block in model.transformer.h]
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, betas=(0.9, 0.98), weight_decay=_DECAY
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.lr, cfg.steps, pct_start=0.1)
    model.train()
    for _ in range(cfg.steps):
        batch, is_answer = rows.draw(cfg.batch_size)
        stream = model.transformer(batch[:, :-1]).last_hidden_state
        loss = _loss(model, stream, batch[:, 1:], is_answer[:, 1:])
        loss = loss + cfg.norm_penalty * sum(squares)
        squares.clear()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if on_step is not None:
            on_step(loss.item())
    for hook in hooks:
        hook.remove()
    return model.eval()


def _loss(model: GPT2LMHeadModel, stream: Tensor, target: Tensor, is_answer: Tensor) -> Tensor:
    """Cross-entropy of the letters asked for, and of a half of the tokens: the words of a spelling
    row are anyone's guess, and the logits of a token cost more than all else."""
    looked_at = torch.rand(target.shape) < 0.5
    letters = functional.cross_entropy(model.lm_head(stream[is_answer]), target[is_answer])
    tokens = functional.cross_entropy(model.lm_head(stream[looked_at]), target[looked_at])
    return tokens + _LETTER_WEIGHT * letters
