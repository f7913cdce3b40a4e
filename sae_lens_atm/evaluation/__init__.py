"""Figures of one SAE, on synthetic data or on a language model."""
