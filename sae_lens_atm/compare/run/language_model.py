"""The SAEs of a comparison on a language model: all of one seed from one forward pass."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from sae_lens import LanguageModelSAERunnerConfig, SAETrainer, TrainingSAE
from sae_lens.load_model import load_model
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.util import temporary_seed
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.compare.plan.l0_target import L0Controller
from sae_lens_atm.compare.plan.planned_run import TRAINER_FIELDS, PlannedRun
from sae_lens_atm.compare.run.curve import HISTORY, History, curve_points
from sae_lens_atm.compare.run.stored_run import (
    TRAINING,
    is_evaluated,
    is_trained,
)
from sae_lens_atm.data.language_model import check_hook, saved_dataset
from sae_lens_atm.errors import Interrupted, NonFiniteBatchError, SettingsError
from sae_lens_atm.evaluation.first_letters import (
    FirstLetters,
    look_at_first_letters,
)
from sae_lens_atm.evaluation.language_model import (
    evaluate_on_language_model,
    hold_out,
    make_store,
)
from sae_lens_atm.files import write_json
from sae_lens_atm.training.checkpoints import load_random_state, save_random_state
from sae_lens_atm.training.run import saved_at_once
from sae_lens_atm.training.run_file import LanguageModelRun
from sae_lens_atm.training.watch import OnStep, StopFlag


class _GroupRunner(MultiSAETrainingRunner):
    """SAELens' runner of several SAEs, watched run by run, and stopped between steps."""

    planned: dict[str, PlannedRun]
    histories: dict[str, History]
    stopped: Path
    """Where the state of a group that was stopped is kept."""
    points: list[int]
    keep_at: set[int]
    """Steps after which the state of the group is kept on the way."""
    on_step: OnStep
    stop: StopFlag
    max_bad_batches: int

    @override
    def _run_with_interruption_handling(self, trainer: MultiSAETrainer) -> Any:
        trainer.data_provider = self._good(trainer.data_provider)
        self.histories = {}
        for name, planned in self.planned.items():
            inner = _with_own_settings(trainer.trainers[name], planned)
            trainer.trainers[name] = inner
            knob = planned.l0_parameter
            controller = L0Controller(inner, knob, planned.l0) if knob.controlled else None
            history = self.histories[name] = History(inner, self.points, None, controller)
            self._watch(inner, history)
        if self.cfg.resume_from_checkpoint is not None:
            self._go_on(trainer)
        first = next(iter(trainer.trainers.values()))
        between_steps = first.maybe_reset_sparsity

        def maybe_stop() -> dict[str, Any]:
            stopping = self.stop.signal_number is not None
            if stopping or trainer.n_training_steps in self.keep_at:
                self._keep(trainer)
            if stopping:
                raise Interrupted(None, self.stop.signal_number or 0)
            return between_steps()

        first.maybe_reset_sparsity = maybe_stop  # pyright: ignore[reportAttributeAccessIssue]
        return trainer.fit()

    def _good(self, batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Those without NaN and Inf: as the SAEs share them, all of them skip the same."""
        in_a_row = 0
        for batch in batches:
            if all(bool(activations.isfinite().all()) for activations in batch.values()):
                in_a_row = 0
                yield batch
                continue
            in_a_row += 1
            if in_a_row >= self.max_bad_batches:
                raise NonFiniteBatchError(f"{in_a_row} batches in a row hold NaN or Inf values")

    def _keep(self, trainer: MultiSAETrainer) -> None:
        """Keep the state of the whole group, or nothing of it."""
        trainer.cfg.checkpoint_path = str(self.stopped.parent)
        partial = self.stopped.with_name(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        trainer.save_checkpoint(partial.name)
        save_random_state(partial)
        for name, history in self.histories.items():
            history.save(partial / name / HISTORY)
        replaced = self.stopped.with_name(".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.stopped.exists():
            self.stopped.rename(replaced)
        partial.rename(self.stopped)
        shutil.rmtree(replaced, ignore_errors=True)

    def _go_on(self, trainer: MultiSAETrainer) -> None:
        # Again, as the trainers that SAELens has loaded it into were replaced since.
        trainer.load_checkpoint(self.stopped)
        for name, history in self.histories.items():
            history.load(self.stopped / name / HISTORY)
        load_random_state(self.stopped)

    def _watch(self, trainer: SAETrainer[Any, Any], history: History) -> None:
        step = trainer.step

        def watched(batch: Tensor) -> Any:
            output = step(batch)
            history.after_step(output)
            self.on_step(trainer, output)
            return output

        trainer.step = watched  # pyright: ignore[reportAttributeAccessIssue]


def _with_own_settings(trainer: SAETrainer[Any, Any], planned: PlannedRun) -> SAETrainer[Any, Any]:
    """A trainer with the learning rate and so on of its own entry: SAELens gives all the same."""
    cfg = planned.run.runner
    own = {name: getattr(cfg, name) for name in TRAINER_FIELDS if hasattr(cfg, name)}
    return SAETrainer(replace(trainer.cfg, **own), trainer.sae, trainer.data_provider)


def train_group(
    group: Sequence[PlannedRun], folder: Path, points: int, on_step: OnStep, stop: StopFlag
) -> None:
    """Train and evaluate the runs of one seed that are not kept yet.

    Raises:
        Interrupted: `stop` asked for it. The next call goes on, as exactly as SAELens' activation
            store can: what its buffer held is skipped.
    """
    cfg = cast(LanguageModelRun, group[0].run).runner
    model = load_language_model(cfg)
    pending = [p for p in group if not is_trained(p, folder)]
    to_train = {p.name: p for p in pending if p.settings.trained}
    saes: dict[str, TrainingSAE[Any]] = {}
    for planned in pending:
        with temporary_seed(planned.seed):
            sae_cfg = planned.run.runner.sae
            saes[planned.name] = TrainingSAE[Any].from_dict(sae_cfg.to_dict())
    runner: _GroupRunner | None = None
    with temporary_seed(group[0].seed):
        if to_train:
            stopped = folder / "groups" / _group_key(to_train) / "stopped"
            config = _multi_config(cfg, {name: p.run.runner.sae for name, p in to_train.items()})
            config.resume_from_checkpoint = str(stopped) if stopped.exists() else None
            runner = _GroupRunner(
                config,
                override_dataset=saved_dataset(cfg.dataset_path),
                override_model=model,
                override_saes={name: saes[name] for name in to_train},
            )
            held_out = hold_out(runner.activations_store, cfg)
            runner.planned, runner.on_step, runner.stop = to_train, on_step, stop
            runner.max_bad_batches = group[0].run.max_bad_batches
            runner.points = curve_points(cfg.total_training_steps, points)
            runner.keep_at = set(curve_points(cfg.total_training_steps, cfg.n_checkpoints + 1)[:-1])
            runner.stopped = stopped
            if stopped.exists():  # before prefetching begins, as in `train`
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
            history = runner.histories[name]
            importance = history.importance(
                {"all latents": list(range(planned.run.runner.sae.d_sae))}
            )
            facts = {
                "step_ms": history.step_ms,
                "curve": history.curve().model_dump(),
                "importance": importance.model_dump() if importance else None,
                "group_seconds": history.seconds,  # one forward pass for all of the group
            }
        _set_metadata(saes[name], cfg)
        with saved_at_once(home / "sae") as partial:
            saes[name].save_inference_model(partial)
        write_json(home / TRAINING, facts)
    if runner is not None:
        shutil.rmtree(runner.stopped.parent, ignore_errors=True)
    letters: FirstLetters | None = None
    for planned in group:
        if not is_evaluated(planned, folder, with_map=False):
            if letters is None and planned.first_letters is not None:
                letters = look_at_first_letters(
                    model, cfg.hook_name, planned.first_letters, cfg.model_kwargs
                )
            evaluate_on_language_model(planned, folder, model, held_out, letters)


def _group_key(names: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(sorted(names)).encode()).hexdigest()[:10]


def _set_metadata(sae: TrainingSAE[Any], cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    # The runner does so for those that it trains; an untrained control needs it to be evaluated.
    sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name = cfg.hook_name, cfg.model_name
    sae.cfg.metadata.hook_head_index = cfg.hook_head_index


def _multi_config(
    cfg: LanguageModelSAERunnerConfig[Any], saes: dict[str, Any]
) -> MultiSAETrainingRunnerConfig:
    own = {f.name for f in fields(MultiSAETrainingRunnerConfig) if not f.name.startswith("_")}
    shared = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name in own}
    shared |= {"n_checkpoints": 0, "checkpoint_path": None, "output_path": None}
    shared |= {"hook_names": cfg.hook_name, "hook_head_indices": cfg.hook_head_index}
    return MultiSAETrainingRunnerConfig(saes=saes, **shared)


def load_language_model(cfg: LanguageModelSAERunnerConfig[Any]) -> Any:
    """The model of a run.

    Raises:
        SettingsError: it cannot be loaded, or the hook or d_in does not fit it.
    """
    try:
        model = load_model(
            cfg.model_class_name,
            cfg.model_name,
            device=cfg.llm_device or cfg.device,
            model_from_pretrained_kwargs=cfg.model_from_pretrained_kwargs,
            hook_names=[cfg.hook_name],
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(
            f"cannot load model_name {cfg.model_name!r}: {type(error).__name__}: {reason}"
        ) from error
    check_hook(cfg, model)
    return model
