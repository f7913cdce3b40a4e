"""Find the L0 at which the decoder rows of an architecture are least similar, without labels."""

from sae_lens_atm.compare.find_l0.search import FoundL0, Round
from sae_lens_atm.compare.find_l0.searches import Search, Searches, find_l0, load_searches

__all__ = ["FoundL0", "Round", "Search", "Searches", "find_l0", "load_searches"]
