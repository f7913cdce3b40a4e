import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.letter_words import (
    FirstLetterConfig,
    letter_of,
    prompt,
    split_and_prompts,
    words_of,
)
from sae_lens_atm.training.schema import parse_fields


class Tokenizer:
    """GPT-2's way: a space belongs to the word after it. Tokens are numbered by frequency."""

    def __init__(self, *tokens):
        self.tokens = tokens

    def get_vocab(self):
        # The order of a vocabulary is not that of the numbers.
        return dict(sorted((token, number) for number, token in enumerate(self.tokens)))

    def convert_tokens_to_string(self, tokens):
        return tokens[0].replace("Ġ", " ").replace("▁", " ")


VOCABULARY = (
    *("Ġthe", "cat", "Ġ", "naïve", "Ġa1", "ĠĠdog", "C", "ĠThe", "Ġcat", "Ġtoo"),
    *("Ġox", "ĠUSA", "dog", "Ġcow", "Ġtea", "tea"),
)


def test_words_are_in_ascii_letters_with_one_leading_space_at_most():
    spaced = [" The", " USA", " cat", " cow", " ox", " tea", " the", " too"]
    assert words_of(Tokenizer(*VOCABULARY)) == [*spaced, "C", "cat", "dog", "tea"]


def test_the_most_frequent_words_with_a_space_are_taken_of_each_letter_in_turn():
    # The first of each letter: the, cat, ox, USA. The second: too, cow. Then tea, then The, which
    # is not in lower case. Words without a space are last, again in turn: cat, dog, tea, then C.
    order = [
        " the",
        " cat",
        " ox",
        " USA",
        " too",
        " cow",
        " tea",
        " The",
        "cat",
        "dog",
        "tea",
        "C",
    ]
    for most in range(1, 14):
        assert words_of(Tokenizer(*VOCABULARY), most) == sorted(order[:most])


def test_two_tokens_of_one_word_are_one_word_at_the_lower_number():
    tokenizer = Tokenizer("▁x", "▁y", "Ġz", "Ġy")
    assert words_of(tokenizer, 2) == [" x", " y"]
    assert words_of(tokenizer) == [" x", " y", " z"]


def test_letters_ignore_space_and_case():
    assert [letter_of(word) for word in (" ant", "Bee", "z")] == [0, 1, 25]


def test_a_prompt_answers_ten_questions_and_asks_one():
    words = [f" w{'abcdefghijkl'[i]}" for i in range(12)]
    text = prompt(" wa", words, random.Random(0))
    lines = text.split("\n")
    assert lines[0] == ""
    assert len(lines) == 12
    assert lines[-1] == " wa has the first letter:"
    assert all(line.endswith(" has the first letter: W") for line in lines[1:-1])
    assert " wa has the first letter: W" not in lines
    assert len(set(lines)) == 12


def many(number):
    letters = "abcdefghij"
    return Tokenizer(*(f"Ġ{letters[i % 10]}{letters[i // 10]}" for i in range(number)))


def test_the_split_is_seeded_and_known_by_its_hash():
    split, prompts = split_and_prompts(many(100), 60, 0)
    again, _ = split_and_prompts(many(100), 60, 0)
    other, _ = split_and_prompts(many(100), 60, 1)
    assert (len(split.train), len(split.test)) == (48, 12)
    assert split == again
    assert split.hash == again.hash != other.hash
    assert sorted(split.train + split.test) == sorted(other.train + other.test)
    assert split.by_letter == [6] * 10 + [0] * 16
    assert Counter(map(len, prompts)) == {48: 1, 12: 2}
    for word, text in zip(split.test, prompts.asked, strict=True):
        assert text.endswith(f"\n{word} has the first letter:")
    # The examples of test prompts are test words, those for absorption are any words.
    shown = {line[:3] for text in prompts.test for line in text.split("\n")[1:]}
    assert shown == set(split.test)


def test_too_few_words_are_one_line():
    with pytest.raises(SettingsError, match=r"^first_letters: there are 50 words"):
        split_and_prompts(many(100), 50, 0)


def test_sparse_probes_have_small_batches_for_few_words():
    cfg = FirstLetterConfig()
    assert [cfg.batch_size_for(n) for n in (4000, 8191, 8192)] == [128, 128, 4096]
    assert FirstLetterConfig(sparse_batch_size=64).batch_size_for(10**5) == 64


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in ("words", "probe_epochs", "probe_lr", "sparse_batch_size")),
        ("min_f1", 1.0),
        ("min_f1", -0.1),
        ("match_l0", -1.0),
        ("match_l0", 0.0),
    ],
)
def test_an_error_names_the_field(field, value):
    with pytest.raises(SettingsError, match=rf"^first_letters\.{field} must"):
        parse_fields(FirstLetterConfig, {field: value}, "first_letters")


@pytest.mark.parametrize("value", [True, False, 32, 1, 2.5])
def test_match_l0_is_a_choice_or_a_number(value):
    cfg = parse_fields(FirstLetterConfig, {"match_l0": value}, "first_letters")
    assert cfg.match_l0 == value
    assert isinstance(cfg.match_l0, bool) == isinstance(value, bool)


def test_all_words_of_the_vocabulary():
    assert parse_fields(FirstLetterConfig, {"words": None}, "first_letters").words is None
    assert parse_fields(FirstLetterConfig, {"words": "4_000"}, "first_letters").words == 4000


def test_the_page_has_every_field_with_its_default():
    page = (Path(__file__).parents[2] / "docs/cli.md").read_text(encoding="utf-8")
    section = page.partition("\n## First letters\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    written = {
        name.strip("| `"): yaml.safe_load(default)
        for names, defaults, _ in rows
        for name, default in zip(names.split(", "), defaults.split(", "), strict=True)
    }
    assert written == asdict(FirstLetterConfig())
