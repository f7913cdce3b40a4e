"""Metrics that SAELens does not have."""

from sae_lens_atm.metrics.absorption import Absorption, AbsorptionScores, absorption

__all__ = ["Absorption", "AbsorptionScores", "absorption"]
