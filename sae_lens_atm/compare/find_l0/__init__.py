"""Find the L0 at which an SAE of an architecture saves the most bits, without labels."""

from sae_lens_atm.compare.find_l0.find import find_l0
from sae_lens_atm.compare.find_l0.search import FoundL0, Round
from sae_lens_atm.compare.find_l0.searches import Search, Searches, load_searches

__all__ = ["FoundL0", "Round", "Search", "Searches", "find_l0", "load_searches"]
