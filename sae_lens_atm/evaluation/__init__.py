"""Figures of one SAE."""
