"""The SAEs of a comparison on a language model. Those of one seed share the forward pass."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from sae_lens import LanguageModelSAERunnerConfig, TrainingSAE
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunnerConfig,
)
from sae_lens.util import temporary_seed

from sae_lens_atm.compare.plan.planned_run import PlannedRun
from sae_lens_atm.compare.run.curve import curve_facts, importance_of_groups
from sae_lens_atm.compare.run.group import GroupRunner
from sae_lens_atm.compare.run.group_parts import parts_to_train
from sae_lens_atm.compare.run.language_model_figures import evaluate_group
from sae_lens_atm.compare.run.stored_run import TRAINING, is_trained
from sae_lens_atm.data.language_model import load_language_model, saved_dataset, set_metadata
from sae_lens_atm.evaluation.language_model import HeldOutTokens, hold_out, make_store
from sae_lens_atm.files import saved_at_once, write_json
from sae_lens_atm.training.curves_page import write_curves
from sae_lens_atm.training.hooks import (
    OnStep,
    StopFlag,
)
from sae_lens_atm.training.latent_history import curve_points
from sae_lens_atm.training.phases import LOADING_MODEL_AND_DATASET, OnPhase, Phase, ignore_phase
from sae_lens_atm.training.run_file import LanguageModelRun


def train_group(
    group: Sequence[PlannedRun],
    folder: Path,
    points: int,
    on_step: OnStep,
    stop: StopFlag,
    on_phase: OnPhase = ignore_phase,
    evaluate: bool = True,
) -> None:
    """Train and evaluate the runs of one seed that are not saved yet.

    Args:
        group: the runs of the seed.
        folder: the folder of the comparison.
        points: number of points of each curve.
        on_step: is called after each step of each SAE.
        stop: flag to stop training and evaluation.
        on_phase: is called with the progress of the work before and after training.
        evaluate: whether to evaluate.

    Raises:
        Interrupted: `stop` requested it. The next call resumes. The activations that waited in
            SAELens' buffer are skipped then.
    """
    cfg = cast(LanguageModelRun, group[0].run).runner
    on_phase(Phase(LOADING_MODEL_AND_DATASET))
    model = load_language_model(cfg)
    pending = [p for p in group if not is_trained(p, folder)]
    held_out: HeldOutTokens | None = None
    for part in parts_to_train([p for p in pending if p.settings.trained], folder):
        saes = {p.name: _new_sae(p) for p in part.runs}
        with temporary_seed(group[0].seed):
            config = _multi_config(cfg, {p.name: p.run.runner.sae for p in part.runs})
            config.resume_from_checkpoint = str(part.resumed) if part.resumed else None
            runner = GroupRunner(
                config,
                override_dataset=saved_dataset(cfg.dataset_path),
                override_model=model,
                override_saes=saes,
            )
            held_out = hold_out(runner.activations_store, cfg)
            runner.planned = {p.name: p for p in part.runs}
            runner.on_step, runner.on_phase, runner.stop = on_step, on_phase, stop
            runner.homes = {p.name: folder / p.folder for p in part.runs}
            runner.points = curve_points(cfg.total_training_steps, points)
            runner.save_at = set(curve_points(cfg.total_training_steps, cfg.n_checkpoints + 1)[:-1])
            runner.saved_state, runner.resumed = part.saved, part.resumed
            if part.resumed is not None:  # SAELens does so after prefetching has begun
                runner.activations_store.load_from_checkpoint(part.resumed)
            runner.run()
        for planned in part.runs:
            _store(saes[planned.name], planned, folder, _facts(runner, planned, folder))
        part.remove_states()
    for planned in pending:
        if not planned.settings.trained:
            _store(_new_sae(planned), planned, folder, {})
    if evaluate:
        with temporary_seed(group[0].seed):
            if held_out is None:
                held_out = hold_out(make_store(cfg, model), cfg)
        evaluate_group(group, folder, model, held_out, stop, on_phase)


def _new_sae(planned: PlannedRun) -> TrainingSAE[Any]:
    with temporary_seed(planned.seed):
        return TrainingSAE[Any].from_dict(planned.run.runner.sae.to_dict())


def _facts(runner: GroupRunner, planned: PlannedRun, folder: Path) -> dict[str, Any]:
    recorder = runner.recorders[planned.name]
    everything = {"all latents": list(range(planned.run.runner.sae.d_sae))}
    importance = importance_of_groups(runner.latents[planned.name], everything)
    write_curves(folder / planned.folder, curve_facts(planned))
    return {
        "step_ms": recorder.step_ms,
        "curve": recorder.curve().model_dump(),
        "importance": importance.model_dump() if importance else None,
        "group_seconds": recorder.seconds,  # of all SAEs that were trained together
    }


def _store(sae: TrainingSAE[Any], planned: PlannedRun, folder: Path, facts: dict[str, Any]) -> None:
    home = folder / planned.folder
    home.mkdir(parents=True, exist_ok=True)
    set_metadata(sae, cast(LanguageModelRun, planned.run).runner)
    with saved_at_once(home / "sae") as partial:
        sae.save_inference_model(partial)
    write_json(home / TRAINING, facts)


def _multi_config(
    cfg: LanguageModelSAERunnerConfig[Any], saes: dict[str, Any]
) -> MultiSAETrainingRunnerConfig:
    own = {f.name for f in fields(MultiSAETrainingRunnerConfig) if not f.name.startswith("_")}
    shared = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name in own}
    shared |= {"n_checkpoints": 0, "checkpoint_path": None, "output_path": None}
    shared |= {"hook_names": cfg.hook_name, "hook_head_indices": cfg.hook_head_index}
    return MultiSAETrainingRunnerConfig(saes=saes, **shared)
