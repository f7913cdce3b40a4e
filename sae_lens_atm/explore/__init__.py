"""A page on which a person looks at the latents of an SAE."""

from sae_lens_atm.explore.explore import explore

__all__ = ["explore"]
