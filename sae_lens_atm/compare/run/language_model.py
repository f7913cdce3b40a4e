"""The SAEs of a comparison on a language model. Those of one seed share the forward pass."""

import hashlib
import shutil
from collections.abc import Iterable, Sequence
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
from sae_lens_atm.compare.run.language_model_figures import evaluate_group
from sae_lens_atm.compare.run.stored_run import TRAINING, is_trained
from sae_lens_atm.data.language_model import load_language_model, saved_dataset, set_metadata
from sae_lens_atm.evaluation.language_model import hold_out, make_store
from sae_lens_atm.files import restore_replaced, saved_at_once, write_json
from sae_lens_atm.training.before_first_step import LOADING, OnPhase, Phase, unseen
from sae_lens_atm.training.curves_page import write_curves
from sae_lens_atm.training.hooks import (
    OnStep,
    StopFlag,
)
from sae_lens_atm.training.latent_history import curve_points
from sae_lens_atm.training.run_file import LanguageModelRun


def train_group(
    group: Sequence[PlannedRun],
    folder: Path,
    points: int,
    on_step: OnStep,
    stop: StopFlag,
    on_phase: OnPhase = unseen,
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
    on_phase(Phase(LOADING))
    model = load_language_model(cfg)
    pending = [p for p in group if not is_trained(p, folder)]
    to_train = {p.name: p for p in pending if p.settings.trained}
    saes: dict[str, TrainingSAE[Any]] = {}
    for planned in pending:
        with temporary_seed(planned.seed):
            sae_cfg = planned.run.runner.sae
            saes[planned.name] = TrainingSAE[Any].from_dict(sae_cfg.to_dict())
    runner: GroupRunner | None = None
    with temporary_seed(group[0].seed):
        if to_train:
            stopped = folder / "groups" / _group_key(to_train) / "stopped"
            restore_replaced(stopped.parent)
            config = _multi_config(cfg, {name: p.run.runner.sae for name, p in to_train.items()})
            config.resume_from_checkpoint = str(stopped) if stopped.exists() else None
            runner = GroupRunner(
                config,
                override_dataset=saved_dataset(cfg.dataset_path),
                override_model=model,
                override_saes={name: saes[name] for name in to_train},
            )
            held_out = hold_out(runner.activations_store, cfg)
            runner.planned, runner.on_step, runner.stop = to_train, on_step, stop
            runner.on_phase = on_phase
            runner.homes = {name: folder / p.folder for name, p in to_train.items()}
            runner.points = curve_points(cfg.total_training_steps, points)
            runner.save_at = set(curve_points(cfg.total_training_steps, cfg.n_checkpoints + 1)[:-1])
            runner.saved_state = stopped
            if stopped.exists():  # SAELens does so after prefetching has begun
                runner.activations_store.load_from_checkpoint(stopped)
            runner.run()
        else:
            held_out = hold_out(make_store(cfg, model), cfg)
    for planned in pending:
        name = planned.name
        home = folder / planned.folder
        home.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {}
        if runner is not None and planned.settings.trained:
            recorder = runner.recorders[name]
            everything = {"all latents": list(range(planned.run.runner.sae.d_sae))}
            importance = importance_of_groups(runner.latents[name], everything)
            write_curves(home, curve_facts(planned))
            facts = {
                "step_ms": recorder.step_ms,
                "curve": recorder.curve().model_dump(),
                "importance": importance.model_dump() if importance else None,
                "group_seconds": recorder.seconds,  # of the whole group
            }
        set_metadata(saes[name], cfg)
        with saved_at_once(home / "sae") as partial:
            saes[name].save_inference_model(partial)
        write_json(home / TRAINING, facts)
    if runner is not None:
        shutil.rmtree(runner.saved_state.parent, ignore_errors=True)
    if evaluate:
        evaluate_group(group, folder, model, held_out, stop, on_phase)


def _group_key(names: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(sorted(names)).encode()).hexdigest()[:10]


def _multi_config(
    cfg: LanguageModelSAERunnerConfig[Any], saes: dict[str, Any]
) -> MultiSAETrainingRunnerConfig:
    own = {f.name for f in fields(MultiSAETrainingRunnerConfig) if not f.name.startswith("_")}
    shared = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name in own}
    shared |= {"n_checkpoints": 0, "checkpoint_path": None, "output_path": None}
    shared |= {"hook_names": cfg.hook_name, "hook_head_indices": cfg.hook_head_index}
    return MultiSAETrainingRunnerConfig(saes=saes, **shared)
