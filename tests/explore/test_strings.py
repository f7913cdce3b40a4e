import numpy as np

from sae_lens_atm.explore.latents import NONE
from sae_lens_atm.explore.strings import Strings


def test_tokens_become_places_among_those_used():
    strings = Strings([np.array([7, 3, 7]), np.array([[NONE, 50]], dtype=np.uint32)])
    assert strings.used.tolist() == [3, 7, 50]
    assert strings.index(np.array([50, NONE, 3], dtype=np.uint32)).tolist() == [2, NONE, 0]
    assert strings.small_index(np.array([7, 3])).dtype == np.uint16
