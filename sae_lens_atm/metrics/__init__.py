"""Metrics that SAELens does not have."""

from sae_lens_atm.metrics.absorption import Absorption, AbsorptionScores, absorption
from sae_lens_atm.metrics.contrastive import ContrastiveScore
from sae_lens_atm.metrics.decoder import DecoderCosine, NthDecoderProjection, decoder_cosine
from sae_lens_atm.metrics.description_length import description_length
from sae_lens_atm.metrics.hierarchy import HierarchyScore
from sae_lens_atm.metrics.saved_bits import saved_bits
from sae_lens_atm.metrics.stability import Stability, StabilityScores, stability

__all__ = [
    "Absorption",
    "AbsorptionScores",
    "ContrastiveScore",
    "DecoderCosine",
    "HierarchyScore",
    "NthDecoderProjection",
    "Stability",
    "StabilityScores",
    "absorption",
    "decoder_cosine",
    "description_length",
    "saved_bits",
    "stability",
]
