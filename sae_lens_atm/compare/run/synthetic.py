"""One SAE of a comparison on synthetic data: trained, saved, evaluated, each kept when done."""

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

from sae_lens_atm.compare.plan.l0_target import L0Controller
from sae_lens_atm.compare.plan.planned_run import PlannedRun, stored_in
from sae_lens_atm.compare.run.batch_pool import Pool, batch_seed
from sae_lens_atm.compare.run.curve import (
    HISTORY,
    History,
    Probe,
    curve_points,
    feature_groups,
)
from sae_lens_atm.compare.run.stored_run import (
    FIGURES,
    MEASURED,
    TRAINING,
    is_evaluated,
    is_trained,
)
from sae_lens_atm.errors import CheckpointError
from sae_lens_atm.evaluation.synthetic import evaluate_closely
from sae_lens_atm.files import write_json
from sae_lens_atm.training.checkpoints import (
    check_pickles,
    newest_checkpoint,
    reading,
    skipped_batches,
)
from sae_lens_atm.training.run import saved_at_once
from sae_lens_atm.training.run_file import SyntheticRun
from sae_lens_atm.training.watch import OnStep, StopFlag, Watch

_ESTIMATED = ("expected_average_only_in", "covariance_whitening")
_PROBE_SAMPLES = 2048
_MAP_SIDE = 256  # features, and latents, that a cosine map shows at most


def pool_of(planned: PlannedRun, folder: Path) -> Pool:
    """The pool that holds the batches of a run; runs of one seed and data share it."""
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
    """Train one SAE and keep it; goes on from where an earlier call was stopped.

    Raises:
        Interrupted: `stop` asked for it; the state is kept.
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
            history = _fit(planned, sae, model, folder, curve_points(steps, points), on_step, stop)
            groups = feature_groups(model, sae.W_dec)
            importance = history.importance(groups)
            facts = {
                "seconds": history.seconds,
                "step_ms": history.step_ms,
                "peak_memory_mib": history.peak_memory_mib,
                "curve": history.curve().model_dump(),
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
) -> History:
    assert isinstance(planned.run, SyntheticRun)
    cfg, home = planned.run.runner, folder / planned.folder
    checkpoint = _newest(home / "checkpoints")
    done = 0 if checkpoint is None else int(checkpoint.name) // cfg.batch_size
    trainer_cfg = cfg.to_sae_trainer_config()
    if checkpoint is not None:
        done += skipped_batches(checkpoint)
    if checkpoint is not None and sae.cfg.normalize_activations in _ESTIMATED:
        done += trainer_cfg.n_batches_for_norm_estimate  # those that the estimate took
    pool = pool_of(planned, folder)
    kept = pool.path.exists()
    batches = pool.read(done) if kept else pool.redraw(model, planned.seed, done)

    def keep_history(checkpoint_path: Path | None) -> None:
        if checkpoint_path is not None:
            history.save(checkpoint_path / HISTORY)

    trainer: SAETrainer[Any, Any] = SAETrainer(
        trainer_cfg, sae, batches, save_checkpoint_fn=keep_history
    )
    controller = (
        L0Controller(trainer, planned.l0_parameter, planned.l0)
        if planned.l0_parameter.controlled
        else None
    )
    with temporary_seed(batch_seed(planned.seed, -1)):
        probe = Probe(*_dense(model.sample_with_features(_PROBE_SAMPLES)), model)
    history = History(trainer, points, probe, controller)
    if checkpoint is not None:
        with reading(checkpoint):
            check_pickles(checkpoint)
            trainer.load_trainer_state(checkpoint)
            sae.load_weights_from_checkpoint(checkpoint)
            history.load(checkpoint / HISTORY)

    def watched(trainer: SAETrainer[Any, Any], output: Any) -> None:
        history.after_step(output)
        on_step(trainer, output)

    Watch(watched, stop, checkpoint).fit(trainer)
    return history


def _newest(folder: Path) -> Path | None:
    try:
        return newest_checkpoint(folder)
    except CheckpointError:  # there is none yet
        return None


def evaluate_one(planned: PlannedRun, model: SyntheticModel, folder: Path, with_map: bool) -> None:
    """Evaluate a kept SAE as its users will load it, and keep the figures."""
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
    """A picture, PNG in base64, of the cosines of true features (across) and of the latents that
    match them best one to one (down): an ideal SAE has a red diagonal and nothing beside it."""
    from matplotlib import image

    vectors = model.feature_dict.feature_vectors.detach().cpu()[:_MAP_SIDE]
    cosine = cosine_similarities(decoder.detach().cpu().float(), vectors.float())
    latents, features = linear_sum_assignment(-cosine.abs().numpy())
    # In steps that the eye still tells apart, which make the picture a fifth of the size.
    shown = (cosine[latents[features.argsort()]] * 16).round().numpy() / 16
    buffer = io.BytesIO()
    image.imsave(buffer, shown, vmin=-1, vmax=1, cmap="RdBu_r", format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _dense(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return pair[0], pair[1].to_dense()
