"""Activations to train on: synthetic ones, and those of language models."""
