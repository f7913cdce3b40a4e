"""Adaptive Temporal Masking for SAELens. Importing this package registers `"atm"`."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "ATMSAE",
    "ATMSAEConfig",
    "ATMTrainingSAE",
    "ATMTrainingSAEConfig",
    "ImportanceTracker",
    "Signals",
    "batch_signals",
    "combine_signals",
    "importance_threshold",
    "mask_probability",
    "register",
    "sample_mask",
    "uniform_at",
]

if TYPE_CHECKING or "sae_lens_atm_cli" not in sys.modules:
    from sae_lens_atm.method.importance import (
        ImportanceTracker,
        Signals,
        batch_signals,
        combine_signals,
    )
    from sae_lens_atm.method.masking import (
        importance_threshold,
        mask_probability,
        sample_mask,
        uniform_at,
    )
    from sae_lens_atm.sae import (
        ATMSAE,
        ATMSAEConfig,
        ATMTrainingSAE,
        ATMTrainingSAEConfig,
        register,
    )
else:  # `sae_lens_atm_cli` says why nothing is imported yet

    def __getattr__(name: str) -> Any:
        """Import a public name at its first use: by a command, or by another plugin."""
        if name in __all__:
            for module in ("sae", "method.importance", "method.masking"):
                names = vars(import_module(f"{__name__}.{module}"))
                if name in names:
                    return names[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
