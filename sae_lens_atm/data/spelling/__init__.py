"""Small language models that learn to spell, trained here without a download."""
