"""Docstrings of Python's standard library as text, their words, and a tokenizer."""

import ast
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, UNKNOWN = SPECIAL = ("<bos>", "<eos>", "<pad>", "<unk>")
QUESTION = ("has", "the", "first", "letter", ":")
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
"""The answers. All other text is in lower case."""
_TOKEN = r"[A-Za-z]+|<[a-z]+>|\n|[^\sA-Za-z]"
_ELSEWHERE = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
_OFTEN = 20  # strings that are not words are in the vocabulary if they occur this often


class Text(NamedTuple):
    """A text as tokens."""

    vocabulary: list[str]
    words: list[str]
    """The words of the vocabulary: strings of one or more letters."""
    tokens: Tensor
    """The text, shape ``(tokens,)``."""


def docstrings() -> Iterator[str]:
    """Yield the docstrings of Python's standard library, in the order of its files."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if _ELSEWHERE.intersection(file.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):  # some files of the tests are invalid on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield text.lower()


@cache
def text(words_per_letter: int) -> Text:
    """Return the docstrings, in a vocabulary of the most frequent words of each first letter."""
    rows = [[*re.findall(_TOKEN, row), "\n"] for row in docstrings()]
    count = Counter(token for row in rows for token in row)
    by_frequency = sorted(count, key=lambda token: (-count[token], token))
    of_letter: dict[str, list[str]] = {letter: [] for letter in LETTERS}
    for token in by_frequency:
        if token.isalpha() and len(token) > 1:
            of_letter[token[0].upper()].append(token)
    chosen = {word for words in of_letter.values() for word in words[:words_per_letter]}
    chosen = sorted(chosen.union(QUESTION[:-1]))
    frequent = {t for t in count if not (t.isalpha() and len(t) > 1) and count[t] >= _OFTEN}
    others = sorted(frequent.union(QUESTION[-1], "\n"))
    vocabulary = [*SPECIAL, *others, *chosen, *LETTERS]
    single = [token for token in others if token.isalpha() and token.isascii()]
    index = {token: i for i, token in enumerate(vocabulary)}
    unknown = index[UNKNOWN]
    tokens = torch.tensor([index.get(token, unknown) for row in rows for token in row])
    return Text(vocabulary, [*single, *chosen, *LETTERS], tokens)


def tokenizer(vocabulary: list[str], name: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words."""
    index = {token: i for i, token in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(index, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(_TOKEN), "removed", invert=True)  # pyright: ignore[reportAttributeAccessIssue]
    words.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{BOS} $A", special_tokens=[(BOS, index[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        name_or_path=name,
        add_bos_token=True,
    )
