import numpy as np
import torch

from sae_lens_atm.explore.beside import match, nearest_in
from sae_lens_atm.explore.examples import LEVELS, Amount, find_examples
from sae_lens_atm.explore.latents import NONE
from tests.explore.sample import reading_of


def test_the_nearest_row_that_fires():
    decoder = torch.tensor([[2.0, 0], [1, 1]])
    other = torch.tensor([[0.0, 3], [5, 0], [9, 1]])
    latent, cosine = nearest_in(decoder, other, torch.tensor([True, False, True]))
    assert latent.tolist() == [2, 2]  # row 1 is nearer to the first, but does not fire
    by_hand = torch.nn.functional.cosine_similarity(decoder, other[[2, 2]])
    torch.testing.assert_close(cosine, by_hand)


def test_a_match_is_shown_in_the_contexts_of_its_latent():
    acts = np.array([[0, 2], [3, 0], [0, 1], [0, 0]], dtype=float)
    reading, other = reading_of(acts), reading_of(acts[:, ::-1] * 2, torch.eye(2).flip(0))
    examples = find_examples(reading, 4, Amount(top=1, part=0, pair=0))
    found = match(reading, other, examples, 4)
    assert found.latent.tolist() == [1, 0]
    assert found.cosine.tolist() == [1, 1]
    assert found.windows.places.tolist() == examples.windows.places.tolist() == [1, 0]
    assert found.windows.offsets.tolist() == [0, 0, 2]
    assert found.windows.levels.tolist() == [LEVELS, LEVELS, -(-LEVELS // 2)]


def test_a_dead_sae_matches_nothing():
    reading, dead = reading_of(np.eye(2)), reading_of(np.zeros((2, 2)))
    found = match(reading, dead, find_examples(reading, 2, Amount(1, 0, 0)), 2)
    assert found.latent.tolist() == [NONE, NONE]
    assert found.windows.places.tolist() == []
