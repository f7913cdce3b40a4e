"""What a comparison keeps of each run, so that nothing finished is done again."""

from pathlib import Path
from typing import Any

from sae_lens import SAE
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_atm.compare.plan.planned_run import Planned
from sae_lens_atm.files import read_json

TRAINING, FIGURES, MEASURED = "training.json", "figures.json", "measured.safetensors"


def is_trained(planned: Planned, folder: Path) -> bool:
    """Whether the SAE is there."""
    return (folder / planned.folder / TRAINING).exists()


def is_evaluated(planned: Planned, folder: Path, with_map: bool) -> bool:
    """Whether its figures are, by the present settings (and its cosine map, if it needs one)."""
    kept = read_json(folder / planned.folder / FIGURES)
    has_map = bool(kept.get("cosine_map")) or not with_map
    return kept.get("evaluation_key") == planned.evaluation_key and has_map


def kept_decoder(planned: Planned, folder: Path) -> tuple[Tensor, Tensor]:
    """The decoder of a kept SAE, and which of its latents fired in the evaluation."""
    home = folder / planned.folder
    sae = SAE[Any].load_from_disk(home / "sae")
    return sae.W_dec.detach(), load_file(home / MEASURED)["alive"]
