import pytest

from sae_lens_atm.data.probing_tasks import choose_tasks
from sae_lens_atm.saebench.inside.choices import evenly_spaced, frequent_words
from tests.probing_package import NAMES, install


class Tokenizer:
    """Its tokens have the ids of their places."""

    tokens = ("Ġthe", "The", "ĠTo", "cat", "Ġtea", "Ġcat", "Ġthe", "Ġtoo", "Ġzoo")

    def get_vocab(self):
        return {token: place for place, token in reversed([*enumerate(self.tokens)])}

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens).replace("Ġ", " ")


@pytest.mark.parametrize("most", [*range(1, 9), 99])
def test_frequent_words_are_taken_evenly_over_the_letters(most):
    best_first = [" the", " cat", " zoo", " tea", " too", " To", "cat", "The"]
    chosen = frequent_words(Tokenizer(), sorted(best_first), most)
    assert chosen == sorted(chosen)
    # Among the letters that have words of a kind, any may come first.
    if most in (3, 4, 5, 6, 8, 99):
        assert chosen == sorted(best_first[:most])
    assert {word.strip()[0].lower() for word in chosen} == set("tcz") or most < 3


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
