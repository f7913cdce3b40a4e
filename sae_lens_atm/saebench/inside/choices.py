"""Choose some of the words and tasks of SAEBench, for a run that ends soon. Runs in either
environment."""

from collections.abc import Sequence
from typing import Any, TypeVar

_Item = TypeVar("_Item")


def frequent_words(tokenizer: Any, words: Sequence[str], most: int) -> list[str]:
    """Return at most so many of a tokenizer's words, sorted.

    Words with a leading space come first, among them words in lower case, among them those with the
    lowest token id. Tokenizers number their tokens from frequent to rare.

    Args:
        tokenizer: the model's tokenizer.
        words: words that are one token each.
        most: the largest number of words.
    """
    ids: dict[str, int] = {}
    for token, number in tokenizer.get_vocab().items():
        word = tokenizer.convert_tokens_to_string([token])
        ids[word] = min(number, ids.get(word, number))

    def rank(word: str) -> tuple[bool, bool, int]:
        return word[0] != " ", not word.islower(), ids.get(word, len(ids))

    return sorted(sorted(words, key=rank)[:most])


def evenly_spaced(items: Sequence[_Item], number: int) -> list[_Item]:
    """Return so many items of a list, at even distances from the first on; at most all."""
    number = min(number, len(items))
    return [items[i * len(items) // number] for i in range(number)]
