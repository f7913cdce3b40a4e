import pytest

from sae_lens_atm.data.probing_tasks import choose_tasks
from sae_lens_atm.saebench.inside.choices import evenly_spaced, frequent_words
from tests.probing_package import NAMES, install


class Tokenizer:
    """Its tokens have the ids of their places."""

    tokens = ("Ġthe", "The", "ĠThe", "cat", "Ġcat", "Ġthe", "Ġzoo")

    def get_vocab(self):
        return {token: place for place, token in reversed([*enumerate(self.tokens)])}

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens).replace("Ġ", " ")


@pytest.mark.parametrize(
    ("most", "chosen"),
    [
        (1, [" the"]),
        (3, [" cat", " the", " zoo"]),
        (4, [" The", " cat", " the", " zoo"]),
        (6, [" The", " cat", " the", " zoo", "The", "cat"]),
        (99, [" The", " cat", " the", " zoo", "The", "cat"]),
    ],
)
def test_frequent_words_with_a_space_and_in_lower_case_come_first(most, chosen):
    words = [" The", " cat", " the", " zoo", "The", "cat"]
    assert frequent_words(Tokenizer(), words, most) == chosen


@pytest.mark.parametrize(
    ("number", "chosen"),
    [(1, [0]), (2, [0, 3]), (3, [0, 2, 4]), (7, [*range(7)]), (9, [*range(7)])],
)
def test_items_are_evenly_spaced(number, chosen):
    assert evenly_spaced(range(7), number) == chosen


def test_a_comparison_and_saebench_choose_the_same_tasks(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    install(tmp_path, monkeypatch)
    for number in (1, 2, 3, 4):
        assert choose_tasks(number) == evenly_spaced(NAMES, number)
