"""What a saved SAE is, where it comes from, and how important its latents are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from torch import Tensor

from sae_lens_atm.errors import SettingsError
from sae_lens_atm.hub.errors import explained
from sae_lens_atm.sae.atm_sae import IMPORTANCE_QUANTILES
from sae_lens_atm.sae.inference import ATMSAE
from sae_lens_atm.training.checkpoints import is_broken

_BAR = 30  # characters of the longest bar of the histogram
_BINS = 10


def load_sae(reference: str) -> SAE[Any]:
    """Load a SAE from a folder, or from the Hub as `REPO:SAE_ID` (or `RELEASE:SAE_ID`).

    Raises:
        SettingsError: the reference is neither, or what is there cannot be loaded.
        HubError: it cannot be fetched.
    """
    try:
        sae = _load_sae(reference)
        for name, tensor in sae.state_dict().items():
            if is_broken(name, tensor):
                raise SettingsError(f"cannot load {reference}: {name} holds NaN or Inf values")
        return sae
    except SettingsError:
        raise
    except Exception as error:  # whatever it is that a file of other people's holds
        of_hub = None if Path(reference).exists() else explained(error, reference)
        if of_hub is not None:
            raise of_hub from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SettingsError(f"cannot load {reference}: {reason}") from error


def _load_sae(reference: str) -> SAE[Any]:
    folder = Path(reference)
    if (folder / SAE_CFG_FILENAME).is_file():
        return SAE[Any].load_from_disk(folder)
    if folder.exists():
        raise SettingsError(f"{reference} holds no {SAE_CFG_FILENAME}: it is not a saved SAE")
    release, colon, sae_id = reference.partition(":")
    if not colon or not sae_id:
        raise SettingsError(f"no folder {reference}: allowed is a folder or REPO:SAE_ID on the Hub")
    return SAE[Any].from_pretrained(release, sae_id)


def describe(sae: SAE[Any]) -> Iterator[Table]:
    """Tables for a terminal: what it is, how it was trained, its importance."""
    metadata = sae.cfg.metadata
    facts: dict[str, Any] = {
        "architecture": sae.cfg.architecture(),
        "trained as": metadata.training_architecture,
        "d_in, d_sae": f"{sae.cfg.d_in}, {sae.cfg.d_sae}",
        "dtype": sae.cfg.dtype,
        "model": metadata.model_name,
        "hook": metadata.hook_name,
        "dataset": metadata.dataset_path,
        "L0 at the end of training": metadata.l0,
        "SAELens": metadata.sae_lens_training_version,
    }
    yield _pairs("SAE", facts)
    yield _pairs("Training", metadata.training_architecture_details or {})
    if isinstance(sae, ATMSAE):
        yield _importance_table(sae.importance)
    elif metadata.importance_quantiles:
        quantiles = {f"quantile {q}": v for q, v in metadata.importance_quantiles.items()}
        yield _pairs("Importance of the latents", quantiles)


def _pairs(title: str, facts: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    for name, value in facts.items():
        if value is not None:
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            table.add_row(f"[dim]{name}", shown)
    return table


def _importance_table(importance: Tensor) -> Table:
    table = Table(
        title="Importance of the latents", title_justify="left", show_header=False, box=None
    )
    quantiles = importance.quantile(torch.tensor(IMPORTANCE_QUANTILES))
    for q, value in zip(IMPORTANCE_QUANTILES, quantiles.tolist(), strict=True):
        table.add_row(f"[dim]quantile {q}", f"{value:.4g}")
    top = max(importance.max().item(), 1e-12)
    counts = torch.histc(importance, _BINS, 0, top).tolist()
    for i, count in enumerate(counts):
        bar = "█" * round(_BAR * count / max(counts))
        table.add_row(
            f"[dim]{i * top / _BINS:.3g} to {(i + 1) * top / _BINS:.3g}", f"{bar} {count:.0f}"
        )
    return table
