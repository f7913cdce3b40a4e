"""A language model of a handful of words, made in a second."""

import string
from unittest import mock

import torch

from sae_lens_atm.data.spelling import model
from sae_lens_atm.data.spelling.model import SpellingLMConfig, make_spelling_lm
from sae_lens_atm.data.spelling.text import Text

TEMPLATE = ["\n", "has", "the", "first", "letter", ":"]
WORDS = ["ant", "bee", "cat", "cow", *(a + b * 2 for a in "abcd" for b in "fghjklmnprst")]


def few_words():
    letters = [*string.ascii_uppercase]
    return ["<bos>", "<eos>", "<pad>", "<unk>", *TEMPLATE, *WORDS, *letters]


def few_rows(_words_per_letter=0):
    return Text(few_words(), WORDS, torch.arange(4, 14).repeat(20))


def tiny(**fields):
    small = {"layers": 1, "d_model": 8, "heads": 2, "context_size": 96, "steps": 3, "batch_size": 4}
    return SpellingLMConfig(**{**small, "dataset_rows": 64, **fields})


def tiny_lm(folder, **fields):
    with mock.patch.object(model, "text", few_rows):
        return make_spelling_lm(tiny(**fields), folder)
