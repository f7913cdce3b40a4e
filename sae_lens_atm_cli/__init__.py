"""The console script `sae-lens-atm`. Help, and errors in a file's YAML, come in under a second.

Importing `sae_lens_atm` imports torch and SAELens, which takes seconds, to register `"atm"`. Python
imports a package before any module in it. So the console script starts outside of the package:
where this module is loaded, `sae_lens_atm` leaves those imports to the commands.
"""

from sae_lens_atm.cli.main import main

__all__ = ["main"]
