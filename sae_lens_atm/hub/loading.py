"""Load an SAE from a folder or from the Hub."""

import json
from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY

from sae_lens_atm.baselines import inference_class
from sae_lens_atm.errors import SettingsError, shown, with_type
from sae_lens_atm.hub.errors import explained
from sae_lens_atm.training.checkpoints import is_broken

_INSIDE = ("sae", "runs/*/sae")
"""Where the folders of a run and of a whole comparison have their SAEs."""


def load_sae(reference: str) -> SAE[Any]:
    """Load an SAE.

    Args:
        reference: a folder, or ``REPO:SAE_ID`` on the Hub (or ``RELEASE:SAE_ID``).

    Raises:
        SettingsError: there is no such SAE, or it cannot be loaded.
        HubError: it cannot be downloaded.
    """
    try:
        sae = _load_sae(reference)
        for name, tensor in sae.state_dict().items():
            if is_broken(name, tensor):
                raise SettingsError(f"cannot load {reference}: {name} holds NaN or Inf values")
        return sae
    except SettingsError:
        raise
    except Exception as error:  # a file from elsewhere can fail in any way
        of_hub = None if Path(reference).exists() else explained(error, reference)
        if of_hub is not None:
            raise of_hub from error
        reason = with_type(error)
        raise SettingsError(f"cannot load {reference}: {reason}") from error


def _load_sae(reference: str) -> SAE[Any]:
    folder = Path(reference)
    if (folder / SAE_CFG_FILENAME).is_file():
        check_architecture(reference, folder / SAE_CFG_FILENAME)
        return SAE[Any].load_from_disk(folder)
    if folder.exists():
        inside = sorted(p for way in _INSIDE for p in folder.glob(f"{way}/{SAE_CFG_FILENAME}"))
        hint = f", did you mean {inside[0].parent}?" if inside else ""
        raise SettingsError(f"{reference} holds no {SAE_CFG_FILENAME}: it is not a saved SAE{hint}")
    release, colon, sae_id = reference.partition(":")
    if not colon or not sae_id:
        raise SettingsError(f"no folder {reference}: give a folder, or REPO:SAE_ID on the Hub")
    return SAE[Any].from_pretrained(release, sae_id)


def check_architecture(reference: str, file: Path) -> None:
    """Check that the architecture in a saved SAE's `cfg.json` is registered with SAELens.

    Raises:
        SettingsError: it is not.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    architecture = content.get("architecture") if isinstance(content, dict) else None
    if not isinstance(architecture, str) or inference_class(architecture) is None:
        names = sorted(SAE_CLASS_REGISTRY)
        raise SettingsError(
            f"cannot load {reference}: architecture in {SAE_CFG_FILENAME} must be one of "
            f"{', '.join(names)}, got {shown(architecture)}"
        )
