"""One SAE of a comparison on synthetic data: trained, saved and evaluated, each only once."""

import base64
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from sae_lens import SAE, TrainingSAE
from sae_lens.synthetic import SyntheticModel
from sae_lens.util import cosine_similarities, temporary_seed
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.compare.run.batch_pool import Pool, batch_seed
from sae_lens_atm.compare.run.curve import (
    HELD_OUT_SAMPLES,
    HeldOutBatch,
    feature_groups,
)
from sae_lens_atm.compare.run.stored_run import (
    FIGURES,
    MEASURED,
    is_evaluated,
)
from sae_lens_atm.evaluation.synthetic import evaluate_closely
from sae_lens_atm.files import write_json
from sae_lens_atm.training.run_file import SyntheticRun

_MAP_SIDE = 256  # features, and latents, that a cosine map shows at most


def pool_of(planned: PlannedRun, folder: Path) -> Pool:
    """Return the pool with the batches of a run. Runs of one seed and data share it."""
    runner = cast(SyntheticRun, planned.run).runner
    name = f"seed-{planned.seed}-{planned.data_key}.pool"
    batches = min(planned.pool_batches or math.inf, runner.total_training_steps)
    return Pool(folder / "pools" / name, int(batches), runner.batch_size, runner.sae.d_in)


class SyntheticData(NamedTuple):
    """The batches and the true features that a run is trained on."""

    planned: PlannedRun
    model: SyntheticModel
    folder: Path

    def batches(self, served: int) -> Iterator[Tensor]:
        """Return the batches after the first `served` ones."""
        pool = pool_of(self.planned, self.folder)
        if pool.path.exists():
            return pool.read(served)
        return pool.redraw(self.model, self.planned.seed, served)

    def held_out(self) -> HeldOutBatch:
        """Draw samples that no run is trained on."""
        with temporary_seed(batch_seed(self.planned.seed, -1)):
            pair = self.model.sample_with_features(HELD_OUT_SAMPLES)
        return HeldOutBatch(pair[0], pair[1].to_dense(), self.model)

    def groups(self, sae: TrainingSAE[Any]) -> dict[str, list[int]]:
        """Return the latents of roots, parents and last children."""
        return feature_groups(self.model, sae.W_dec)


def evaluate_one(planned: PlannedRun, model: SyntheticModel, folder: Path, with_map: bool) -> None:
    """Evaluate a saved SAE, loaded as users load it, and save the figures."""
    home = folder / planned.folder
    if is_evaluated(planned, folder, with_map):
        return
    assert isinstance(planned.run, SyntheticRun)
    cfg = planned.run.runner
    sae = SAE[Any].load_from_disk(home / "sae", device=cfg.device)
    found = evaluate_closely(
        sae, model, cfg.eval_samples, batch_seed(planned.seed, -2), cfg.batch_size
    )
    save_file({"alive": found.alive}, home / MEASURED)
    scores = found.absorption
    write_json(
        home / FIGURES,
        {
            "evaluation_key": planned.evaluation_key,
            "figures": found.figures,
            "absorption_by_parent": [] if scores is None else scores.fraction_by_parent.tolist(),
            "signed": found.signed,
            "parent_probability": found.parent_probability,
            "cosine_map": cosine_map(sae.W_dec, model) if with_map else "",
        },
    )


def cosine_map(decoder: Tensor, model: SyntheticModel) -> str:
    """Return a picture of cosines between true features and latents: a PNG in base64.

    Columns are features. Rows are the latents that match them best, one to one. An ideal SAE has
    a red diagonal on white.
    """
    from matplotlib import image

    vectors = model.feature_dict.feature_vectors.detach().cpu()[:_MAP_SIDE]
    cosine = cosine_similarities(decoder.detach().cpu().float(), vectors.float())
    latents, features = linear_sum_assignment(-cosine.abs().numpy())
    # In steps of 1/16, with which the file is a fifth of the size.
    shown = (cosine[latents[features.argsort()]] * 16).round().numpy() / 16
    buffer = io.BytesIO()
    image.imsave(buffer, shown, vmin=-1, vmax=1, cmap="RdBu_r", format="png")
    return base64.b64encode(buffer.getvalue()).decode()
