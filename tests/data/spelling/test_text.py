import pytest

from sae_lens_atm.data.spelling import text as module
from sae_lens_atm.data.spelling.text import LETTERS, text, tokenizer


@pytest.fixture
def few_docstrings(monkeypatch):
    rows = ["the cat saw the car: a can!\nthe dog", "the dog", "zebra, the cat"]
    monkeypatch.setattr(module, "docstrings", lambda: iter(rows))
    text.cache_clear()
    yield
    text.cache_clear()


@pytest.mark.usefixtures("few_docstrings")
def test_the_most_frequent_words_of_each_letter_are_kept():
    found = text(2)
    # Of cat there are 2, of can and car 1; the words of the question are always there.
    words = ["can", "cat", "dog", "first", "has", "letter", "saw", "the", "zebra"]
    assert found.words == [*words, *LETTERS]
    assert {"\n", ":"} <= set(found.vocabulary)
    assert [found.vocabulary[i] for i in found.tokens[:8]] == [
        "the", "cat", "saw", "the", "<unk>", ":", "<unk>", "can",
    ]  # fmt: skip
    assert found.vocabulary[-26:] == list(LETTERS)


def test_docstrings_are_those_of_the_standard_library():
    first = next(module.docstrings())
    assert first == first.lower()
    assert len(first) > 20


def test_a_tokenizer_of_words(tmp_path):
    words = tokenizer(["<bos>", "<eos>", "<pad>", "<unk>", "\n", ":", "cat", "has", "C"], "here")
    assert words("\ncat has: C dog").input_ids == [0, 4, 6, 7, 5, 8, 3]
    assert words("cat", add_special_tokens=False).input_ids == [6]
    words.save_pretrained(tmp_path)
    loaded = type(words).from_pretrained(tmp_path)
    assert loaded("\ncat has: C dog").input_ids == [0, 4, 6, 7, 5, 8, 3]
    assert loaded.bos_token == "<bos>"
