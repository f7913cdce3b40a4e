"""The command line."""

from sae_lens_atm.cli.main import main

__all__ = ["main"]
