"""One SAE of a comparison on synthetic data: trained, saved and evaluated, each only once."""

import base64
import io
import math
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE, SAETrainer, TrainingSAE
from sae_lens.synthetic import SyntheticModel
from sae_lens.util import cosine_similarities, temporary_seed
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae_lens_atm.compare.plan.planned_run import PlannedRun, stored_in
from sae_lens_atm.compare.run.batch_pool import Pool, batch_seed
from sae_lens_atm.compare.run.curve import (
    CurveRecorder,
    HeldOutBatch,
    curve_points,
    feature_groups,
)
from sae_lens_atm.compare.run.l0_controller import L0Controller
from sae_lens_atm.compare.run.stored_run import (
    FIGURES,
    MEASURED,
    TRAINING,
    is_evaluated,
    is_trained,
)
from sae_lens_atm.errors import CheckpointError
from sae_lens_atm.evaluation.synthetic import evaluate_closely
from sae_lens_atm.files import saved_at_once, write_json
from sae_lens_atm.training.checkpoints import (
    ESTIMATED_SCALES,
    check_pickles,
    estimation_batches,
    newest_checkpoint,
    reading,
    samples_of,
    skipped_batches,
)
from sae_lens_atm.training.fit import fit
from sae_lens_atm.training.hooks import OnStep, StepCallback, StepTimer, StopFlag
from sae_lens_atm.training.run_file import SyntheticRun

_HELD_OUT_SAMPLES = 2048
_MAP_SIDE = 256  # features, and latents, that a cosine map shows at most


def pool_of(planned: PlannedRun, folder: Path) -> Pool:
    """Return the pool with the batches of a run. Runs of one seed and data share it."""
    runner = cast(SyntheticRun, planned.run).runner
    name = f"seed-{planned.seed}-{planned.data_key}.pool"
    batches = min(planned.pool_batches or math.inf, runner.total_training_steps)
    return Pool(folder / "pools" / name, int(batches), runner.batch_size, runner.sae.d_in)


def train_one(
    planned: PlannedRun,
    model: SyntheticModel,
    folder: Path,
    points: int,
    on_step: OnStep,
    stop: StopFlag,
) -> None:
    """Train one SAE and save it. Resume where an earlier call was stopped.

    Raises:
        Interrupted: `stop` requested it. A checkpoint is saved.
    """
    home = folder / planned.folder
    if is_trained(planned, folder):
        return
    planned = stored_in(planned, home)
    assert isinstance(planned.run, SyntheticRun)
    cfg, steps = planned.run.runner, planned.run.runner.total_training_steps
    home.mkdir(parents=True, exist_ok=True)
    if cfg.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(cfg.device)
    with temporary_seed(planned.seed):
        sae = TrainingSAE[Any].from_dict(cfg.sae.to_dict()).to(cfg.device)
        facts: dict[str, Any] = {}
        if planned.settings.trained:
            recorder = _fit(planned, sae, model, folder, curve_points(steps, points), on_step, stop)
            groups = feature_groups(model, sae.W_dec)
            importance = recorder.importance(groups)
            facts = {
                "seconds": recorder.seconds,
                "step_ms": recorder.step_ms,
                "peak_memory_mib": recorder.peak_memory_mib,
                "curve": recorder.curve().model_dump(),
                "importance": importance.model_dump() if importance else None,
            }
    with saved_at_once(home / "sae") as partial:
        sae.save_inference_model(partial)
    write_json(home / TRAINING, facts)
    shutil.rmtree(home / "checkpoints", ignore_errors=True)


def _fit(
    planned: PlannedRun,
    sae: TrainingSAE[Any],
    model: SyntheticModel,
    folder: Path,
    points: list[int],
    on_step: OnStep,
    stop: StopFlag,
) -> CurveRecorder:
    assert isinstance(planned.run, SyntheticRun)
    cfg, home = planned.run.runner, folder / planned.folder
    trainer_cfg = cfg.to_sae_trainer_config()
    checkpoint = _newest(home / "checkpoints")
    served = 0  # batches that the run has read before
    if checkpoint is not None:
        served = samples_of(checkpoint) // cfg.batch_size + skipped_batches(checkpoint)
        if sae.cfg.normalize_activations in ESTIMATED_SCALES:
            taken = estimation_batches(checkpoint)
            served += trainer_cfg.n_batches_for_norm_estimate if taken is None else taken
    pool = pool_of(planned, folder)
    is_stored = pool.path.exists()
    batches = pool.read(served) if is_stored else pool.redraw(model, planned.seed, served)
    trainer: SAETrainer[Any, Any] = SAETrainer(trainer_cfg, sae, batches)
    with temporary_seed(batch_seed(planned.seed, -1)):
        held_out = HeldOutBatch(*_dense(model.sample_with_features(_HELD_OUT_SAMPLES)), model)
    controller = (
        L0Controller(trainer, planned.l0_parameter, planned.l0)
        if planned.l0_parameter.controlled
        else None
    )
    timer = StepTimer(sae.device)
    recorder = CurveRecorder(trainer, points, timer, held_out, controller)
    if checkpoint is not None:
        with reading(checkpoint):
            check_pickles(checkpoint)
            trainer.load_trainer_state(checkpoint)
            sae.load_weights_from_checkpoint(checkpoint)
            recorder.load(checkpoint)
    controllers = [] if controller is None else [controller]
    fit(
        trainer,
        stop,
        checkpoint,
        hooks=[timer, *controllers, recorder, StepCallback(trainer, on_step)],
        max_bad_batches=planned.run.max_bad_batches,
    )
    return recorder


def _newest(folder: Path) -> Path | None:
    try:
        return newest_checkpoint(folder)
    except CheckpointError:  # the run starts from the beginning
        return None


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


def _dense(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0], pair[1].to_dense()
