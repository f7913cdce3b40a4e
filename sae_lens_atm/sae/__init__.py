"""SAELens' classes of the architecture `"atm"`. Importing this package registers them."""

from sae_lens import register_sae_class, register_sae_training_class
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from sae_lens_atm.sae import activations as activations
from sae_lens_atm.sae.atm_sae import ATMTrainingSAE
from sae_lens_atm.sae.config import ATMSAEConfig, ATMTrainingSAEConfig
from sae_lens_atm.sae.inference import ATMSAE


def register() -> None:
    """Register `"atm"` with SAELens; importing this package has done it already.

    Raises:
        ValueError: another class is registered under the name.
    """
    inference, training = (ATMSAE, ATMSAEConfig), (ATMTrainingSAE, ATMTrainingSAEConfig)
    if _is_free(SAE_CLASS_REGISTRY.get("atm"), inference):
        register_sae_class("atm", *inference)
    if _is_free(SAE_TRAINING_CLASS_REGISTRY.get("atm"), training):
        register_sae_training_class("atm", *training)


def _is_free(present: tuple[type, type] | None, ours: tuple[type, type]) -> bool:
    if present is not None and present != ours:
        raise ValueError(
            f"SAELens' registry already has {present[0].__module__}.{present[0].__qualname__} "
            f"under 'atm', so sae_lens_atm cannot register {ours[0].__qualname__} there"
        )
    return present is None


register()
