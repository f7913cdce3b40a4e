"""A page on which a person looks at the latents of an SAE."""

from sae_lens_atm.explore.explore import explore
from sae_lens_atm.explore.letters import LetterSource

__all__ = ["LetterSource", "explore"]
