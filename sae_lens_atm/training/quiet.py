"""Silence SAELens' progress bars and warnings, where the command line shows its own progress."""

import logging
import warnings
from typing import Any

import sae_lens
from sae_lens.synthetic import feature_dictionary
from sae_lens.training import activation_scaler, multi_sae_trainer, sae_trainer
from tqdm.auto import tqdm


def silence_saelens() -> None:
    """Disable SAELens' progress bars and hide its warnings, in this process."""
    for module in (sae_trainer, multi_sae_trainer, activation_scaler, feature_dictionary):
        setattr(module, "tqdm", _disabled_bar)  # noqa: B010
    warnings.filterwarnings("ignore", module=r"sae_lens\.")
    warnings.filterwarnings("ignore", message=".*decoder_init_norm must be set.*")
    sae_lens.logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    # SAELens logs "override" for each model and dataset that is passed to it.
    return "override" not in record.getMessage()


def _disabled_bar(*args: Any, **kwargs: Any) -> Any:
    return tqdm(*args, **{**kwargs, "disable": True})
