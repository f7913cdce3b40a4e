"""A small language model whose activations hold words and their first letters.

Absorption needs a model that represents, on the token of a word, both the word and its first
letter. Half of the training text are docstrings, half is spelling:

- the prompts of SAEBench;
- words directly followed by their first letter. Without these, the model computes a letter only
  in the prompt, after the layer where SAEs are trained.

Noise in the residual stream makes the model separate the directions of the letters. A penalty on
the norm of the stream keeps it from making the noise irrelevant.
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
from sae_lens_atm.files import check_new_folder

HOOK = "transformer.h.0"
"""The hook for SAEs: the residual stream after the first layer."""
TOKENS = "tokens"
_DONE = "spelling-lm.json"
_LARGEST = 2**20
_DECAY = 1.0  # strong, as the initial values of a word's embedding hide its letter
_LETTER_WEIGHT = 100.0  # weight of the loss of first letters


@dataclass
class SpellingLMConfig:
    """The model and its training. With the defaults it takes about 3 minutes on 2 cores.

    Args:
        seed: seed of the weights, the batches and the noise.
        words_per_letter: words of each first letter in the vocabulary, the most frequent. Rare
            letters have fewer words.
        layers: number of transformer layers.
        d_model: width of the residual stream.
        heads: number of attention heads in a layer.
        context_size: number of tokens in a row, with <bos>.
        steps: number of training steps.
        batch_size: number of rows in a step. Half are text, half are spelling.
        lr: the highest learning rate.
        noise: standard deviation of the noise after each layer, in each dimension.
        norm_penalty: weight of the residual stream's mean square after each layer.
        dataset_rows: number of rows in the dataset of tokens that is saved with the model.
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
        whole = dict.fromkeys(("words_per_letter", "layers", "d_model", "heads", "steps"), 1)
        # A quarter of the rows are prompts, a quarter words with their letters.
        for name, least in (whole | {"batch_size": 4, "dataset_rows": 4}).items():
            if not least <= getattr(self, name) <= _LARGEST:
                raise ValueError(
                    f"{name} must be {least} or more, and at most 2**20, got "
                    f"{getattr(self, name)!r}"
                )
        if not 0 < self.lr <= 1:
            raise ValueError(f"lr must be in (0, 1], got {self.lr!r}")
        for name in ("noise", "norm_penalty"):
            if not 0 <= getattr(self, name) <= 1e6:
                raise ValueError(f"{name} must be from 0 to 1e6, got {getattr(self, name)!r}")
        if not 16 <= self.context_size <= _LARGEST:
            raise ValueError(
                f"context_size must be 16 or more, and at most 2**20, got {self.context_size!r}"
            )
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be from 0 to 2**31 - 1, got {self.seed!r}")
        if self.d_model % self.heads:
            raise ValueError(
                f"d_model must be a multiple of heads = {self.heads}, got {self.d_model!r}"
            )


class Rows:
    """Draws rows of tokens, half text and half spelling."""

    def __init__(self, text: Text, context_size: int, generator: torch.Generator) -> None:
        index = {token: i for i, token in enumerate(text.vocabulary)}
        self.text, self.length, self.generator = text.tokens, context_size - 1, generator
        self.words = torch.tensor([index[word] for word in text.words])
        first = [word[0].upper() for word in text.words]
        # Each letter is drawn equally often. Otherwise letters with few words are hardly learned.
        self.weights = 1 / torch.tensor([first.count(letter) for letter in first])
        self.answers = torch.tensor([index[word[0].upper()] for word in text.words])
        self.template = torch.tensor([index[token] for token in QUESTION])
        self.newline = torch.tensor([index["\n"]])

    def draw(self, rows: int) -> tuple[Tensor, Tensor]:
        """Draw rows of text, then of spelling.

        Returns:
            The tokens, where each row starts with <bos> = 0, and which of them are first letters.
        """
        prompts, direct = rows // 4, rows // 4
        text = self._text(rows - prompts - direct)
        drawn = [
            (text, torch.zeros_like(text, dtype=torch.bool)),
            self._spelling(prompts, self.template),
            self._spelling(direct, self.template[:0]),
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
    """Train the model, and save it with its tokenizer and a dataset of token rows.

    `transformers` loads the folder with `from_pretrained`, `datasets` its `tokens` with
    `load_from_disk`. If the folder holds this model already, nothing is done.

    Args:
        cfg: the model and its training.
        folder: where to save it. It is written under a hidden name first.
        on_step: called with the loss after each step.

    Returns:
        The folder.

    Raises:
        SettingsError: the folder holds other files.
    """
    if is_spelling_lm(cfg, folder):
        return folder
    check_new_folder("FOLDER", folder)
    material = text(cfg.words_per_letter)
    if cfg.context_size > len(material.tokens):
        raise SettingsError(
            f"context_size must be at most {len(material.tokens):,}, the tokens of the text, got "
            f"{cfg.context_size:,}"
        )
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
    """Return whether a folder holds the model of this config."""
    done = folder / _DONE
    return done.is_file() and json.loads(done.read_text(encoding="utf-8")) == asdict(cfg)


@contextmanager
def _one_thread() -> Generator[None]:
    """Use one thread: with more, rounding depends on the load of the machine."""
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
            # GPT-2's value is for a width of 768. With it, letters are learned slowly.
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
    rising = 0.2 if cfg.steps == 10 else 0.1  # OneCycleLR divides by `rising * steps - 1`
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, cfg.lr, cfg.steps, pct_start=rising)
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
    """Return the cross-entropy of the first letters and of a random half of the tokens.

    The logits take most of the time, and half of them is enough.
    """
    chosen = torch.rand(target.shape) < 0.5
    letters = functional.cross_entropy(model.lm_head(stream[is_answer]), target[is_answer])
    tokens = functional.cross_entropy(model.lm_head(stream[chosen]), target[chosen])
    return tokens + _LETTER_WEIGHT * letters
