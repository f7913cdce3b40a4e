"""A small language model that learns first letters, trained without a download."""
