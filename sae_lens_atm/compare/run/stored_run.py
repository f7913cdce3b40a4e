"""The files that a comparison stores for each run. A stored run is not trained again.

Its figures are complete without its SAE. The folder `sae` of a run that is evaluated may be
removed, and the JSON files of a run may be copied to another machine.
"""

from pathlib import Path
from typing import Any

from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from safetensors.torch import load_file
from torch import Tensor

from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.files import read_json

TRAINING, FIGURES, MEASURED = "training.json", "figures.json", "measured.safetensors"


def is_trained(planned: PlannedRun, folder: Path) -> bool:
    """Return whether the trained SAE is stored, or was evaluated and removed."""
    stored = has_sae(planned, folder) or is_evaluated(planned, folder, False)
    return has_training(planned, folder) and stored


def has_training(planned: PlannedRun, folder: Path) -> bool:
    """Return whether the facts of the training are stored."""
    return (folder / planned.folder / TRAINING).exists()


def has_sae(planned: PlannedRun, folder: Path) -> bool:
    """Return whether the weights of a run are stored."""
    return (folder / planned.folder / "sae" / SAE_CFG_FILENAME).exists()


def has_decoder(planned: PlannedRun, folder: Path) -> bool:
    """Return whether the files of `load_decoder` are stored."""
    return has_sae(planned, folder) and (folder / planned.folder / MEASURED).exists()


def is_evaluated(planned: PlannedRun, folder: Path, with_map: bool) -> bool:
    """Return whether the figures are stored, measured with the present settings.

    Args:
        planned: the run.
        folder: the comparison's folder.
        with_map: whether its picture of cosines must be stored, too.
    """
    evaluation = read_json(folder / planned.folder / FIGURES)
    has_map = bool(evaluation.get("cosine_map")) or not with_map
    return evaluation.get("evaluation_key") == planned.evaluation_key and has_map


def load_decoder(planned: PlannedRun, folder: Path) -> tuple[Tensor, Tensor]:
    """Return a stored decoder ``(d_sae, d_in)``, and which of its latents fired ``(d_sae,)``."""
    home = folder / planned.folder
    sae = SAE[Any].load_from_disk(home / "sae")
    return sae.W_dec.detach(), load_file(home / MEASURED)["alive"]
