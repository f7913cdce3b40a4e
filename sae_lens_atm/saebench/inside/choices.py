"""Choose some of the words and tasks of SAEBench, for a run that ends soon. Runs in either
environment."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

_Item = TypeVar("_Item")


def frequent_words(tokenizer: Any, words: Sequence[str], most: int) -> list[str]:
    """Return at most so many of a tokenizer's words, sorted.

    They are taken evenly over the first letters, words with a leading space first. For a letter,
    words in lower case come first, among them those with the lowest token id. Tokenizers number
    their tokens from frequent to rare. `first_letters` in a comparison takes the same words.

    Args:
        tokenizer: the model's tokenizer.
        words: words that are one token each.
        most: the largest number of words.
    """
    ids: dict[str, int] = {}
    for token, number in tokenizer.get_vocab().items():
        word = tokenizer.convert_tokens_to_string([token])
        ids[word] = min(number, ids.get(word, number))
    taken: Counter[tuple[bool, str]] = Counter()
    places: dict[str, tuple[bool, int]] = {}
    for word in sorted(words, key=lambda word: (not word.islower(), ids.get(word, len(ids)))):
        kind = word[0] != " ", word.strip()[0].lower()
        places[word] = kind[0], taken[kind]
        taken[kind] += 1
    return sorted(sorted(places, key=lambda word: places[word])[:most])


def evenly_spaced(items: Sequence[_Item], number: int) -> list[_Item]:
    """Return so many items of a list, at even distances from the first on; at most all."""
    number = min(number, len(items))
    return [items[i * len(items) // number] for i in range(number)]
