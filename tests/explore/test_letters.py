import pytest
import torch

from sae_lens_atm.evaluation.first_letters import FirstLetters
from sae_lens_atm.evaluation.letter_words import FirstLetterConfig, Split
from sae_lens_atm.explore.letters import MissedWord, describe_letters
from sae_lens_atm.metrics.probes import Probe, Words
from tests.explore.sample import linear_sae

LETTERS, ANY = 26, 26  # the special dimension and latent of the word "any"


@pytest.fixture
def letters():
    """Each letter is a dimension. The word "any" has one more."""
    letter = torch.arange(LETTERS)
    train = Words(torch.eye(LETTERS, 27).repeat(10, 1), letter.repeat(10))
    names = [f"{chr(97 + c)}{i}" for i in range(4) for c in range(LETTERS)]
    x = torch.eye(LETTERS, 27).repeat(4, 1)
    names[0], x[0, ANY] = " any", 1
    probe = Probe(10 * torch.eye(LETTERS, 27), torch.full((LETTERS,), -5.0))
    split = Split([f"t{i}" for i in range(260)], names)
    test = Words(x, letter.repeat(4))
    cfg = FirstLetterConfig(probe_epochs=1)
    return FirstLetters(split, train, test, x, probe, torch.ones(LETTERS), cfg)


def sae_of(absorbs):
    """A latent for each letter and one for "any", which silences the latent of A if `absorbs`."""
    decoder, encoder = torch.eye(27), torch.eye(27)
    if absorbs:
        decoder[ANY] = torch.nn.functional.normalize(torch.eye(27)[0] + torch.eye(27)[ANY], dim=0)
        encoder[ANY, 0] = -2  # from the dimension of "any" to the latent of A
    return linear_sae(decoder, encoder)


def test_the_absorbed_word_names_its_latent(letters):
    found = describe_letters(sae_of(absorbs=True), letters)
    assert "".join(letter.letter for letter in found) == "abcdefghijklmnopqrstuvwxyz"
    assert found[0].latents == [0]
    assert (found[0].words, found[0].missed, found[0].absorbed) == (4, 1, 1)
    (word,) = found[0].missed_words
    assert word == MissedWord("any", ANY, pytest.approx(0.5**0.5), absorbed=True)


def test_an_sae_that_absorbs_nothing_misses_nothing(letters):
    found = describe_letters(sae_of(absorbs=False), letters)
    # With so few words the sparse probe finds a wrong latent for some letter.
    own = [one for number, one in enumerate(found) if one.latents == [number]]
    assert len(own) > 20
    assert own[0].letter == "a"
    assert all((one.words, one.missed, one.fraction) == (4, 0, 0) for one in own)


def test_the_page_has_the_activations_that_an_evaluation_has(letters):
    """`match_l0` removes the weak activations of the first word of each letter."""
    asked = letters.asked.clone()
    asked[:LETTERS] /= 2
    cfg = FirstLetterConfig(probe_epochs=1, match_l0=0.9)  # 421 of 469; 443 are not halved
    found = describe_letters(sae_of(absorbs=False), letters._replace(asked=asked, cfg=cfg))
    own = [one for number, one in enumerate(found) if one.latents == [number]]
    assert len(own) > 20
    assert all((one.words, one.missed) == (4, 1) for one in own)
