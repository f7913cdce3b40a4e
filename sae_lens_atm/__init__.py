"""Adaptive Temporal Masking for SAELens. Importing this package registers `"atm"`."""

from sae_lens import register_sae_class, register_sae_training_class
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from sae_lens_atm.config import ATMSAEConfig, ATMTrainingSAEConfig
from sae_lens_atm.importance import ImportanceTracker, Signals, batch_signals, combine_signals
from sae_lens_atm.masking import importance_threshold, mask_probability, sample_mask, uniform_at
from sae_lens_atm.sae import ATMSAE, ATMTrainingSAE

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


def register() -> None:
    """Register `"atm"` with SAELens; importing the package has done it already.

    Raises:
        ValueError: another class is registered under the name.
    """
    for registry, add, entry in (
        (SAE_CLASS_REGISTRY, register_sae_class, (ATMSAE, ATMSAEConfig)),
        (
            SAE_TRAINING_CLASS_REGISTRY,
            register_sae_training_class,
            (ATMTrainingSAE, ATMTrainingSAEConfig),
        ),
    ):
        present = registry.get("atm")
        if present is None:
            add("atm", *entry)
        elif present != entry:
            raise ValueError(
                f"SAELens' registry already has {present[0].__module__}.{present[0].__qualname__} "
                f"under 'atm', so sae_lens_atm cannot register {entry[0].__qualname__} there"
            )


register()
