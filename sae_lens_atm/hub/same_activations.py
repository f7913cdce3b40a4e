"""Check that an SAE was trained on the activations on which it is evaluated or shown."""

from pathlib import Path
from typing import Any

from sae_lens import SAE
from transformer_lens.loading_from_pretrained import get_official_model_name

from sae_lens_atm.data.model_identity import source_identity
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.run_file import LanguageModelRun, Run


def check_sae(name: str, sae: SAE[Any], run: Run) -> None:
    """Check width, model and hook of an SAE. What its metadata does not say is not checked.

    Raises:
        SettingsError: one of them is not that of the run.
    """
    d_in = run.runner.sae.d_in
    if sae.cfg.d_in != d_in:
        raise SettingsError(f"d_in of {name} must be {d_in}, as in the file, got {sae.cfg.d_in}")
    metadata = sae.cfg.metadata
    if not isinstance(run, LanguageModelRun):
        if metadata.model_name:
            raise SettingsError(
                f"{name} was trained on {metadata.model_name}, and the file has synthetic data: "
                "give the file of its language model"
            )
        return
    cfg = run.runner
    if metadata.hook_name and metadata.hook_name != cfg.hook_name:
        raise SettingsError(
            f"hook_name of {name} must be {cfg.hook_name}, as in the file, got "
            f"{metadata.hook_name}: give the file of its hook, or --set hook_name"
        )
    if metadata.model_name and not _is_same_model(str(metadata.model_name), cfg.model_name):
        raise SettingsError(
            f"model_name of {name} must be {cfg.model_name}, as in the file, got "
            f"{metadata.model_name}: give the file of its model"
        )


def _is_same_model(one: str, other: str) -> bool:
    """Return whether two names or folders are the same model, as far as that can be known."""
    names = [Path(_official(name)).name.lower() for name in (one, other)]
    if one == other or names[0] == names[1]:
        return True
    # The same folder may have been moved or linked.
    return Path(one).exists() and source_identity(one) == source_identity(other)


def _official(name: str) -> str:
    """Return the Hub's name of a model for one of TransformerLens' names, or else the name."""
    try:
        return get_official_model_name(name)
    except ValueError:
        return name
