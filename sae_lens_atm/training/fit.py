"""Training with SAELens' trainer under the hooks that every run has."""

import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_lens import SAETrainer, TrainingSAE
from sae_lens.constants import SAE_CFG_FILENAME

from sae_lens_atm.data.random_state import load_random_state
from sae_lens_atm.errors import Interrupted, NonFiniteBatchError, RankLostError, with_type
from sae_lens_atm.files import read_json, to_json, write_text
from sae_lens_atm.training.before_first_step import BeforeFirstStep, ModelBatches
from sae_lens_atm.training.checkpointer import Checkpointer
from sae_lens_atm.training.checkpoints import (
    CHANGED_BY_FOLDING,
    run_config,
    skipped_batches,
)
from sae_lens_atm.training.guard import BadBatchGuard, DeferredUpdates
from sae_lens_atm.training.history import History, LastBatch
from sae_lens_atm.training.hooks import (
    CollapseWarning,
    OnStep,
    StepCallback,
    StopFlag,
    StopRequest,
    StopRequested,
)
from sae_lens_atm.training.latent_history import LatentHistory, curve_points
from sae_lens_atm.training.parallel import AcrossRanks, RankExchange
from sae_lens_atm.training.phases import OnPhase, ignore_phase
from sae_lens_atm.training.ranks import Ranks
from sae_lens_atm.training.run_file import Run
from sae_lens_atm.training.supervise import Hook, supervise


def fit(
    trainer: SAETrainer[Any, Any],
    stop: StopFlag,
    checkpoint: Path | None = None,
    *,
    hooks: Sequence[Hook] = (),
    max_bad_batches: int = 10,
    keep: int | None = None,
    config: dict[str, Any] | None = None,
    ranks: Ranks | None = None,
    restores_random_state: bool = True,
    on_phase: OnPhase = ignore_phase,
    model_batches: ModelBatches | None = None,
) -> int:
    """Train to the end, and return the number of bad batches that were skipped.

    Args:
        trainer: the trainer. If it resumes, its state and weights are loaded already.
        stop: requests a stop from outside.
        checkpoint: the checkpoint that the trainer was loaded from.
        hooks: more hooks, inside of those that every run has.
        max_bad_batches: number of bad batches in a row at which training stops.
        keep: number of checkpoints to keep; None keeps all.
        config: the configuration stored in each checkpoint, where SAELens does not store it.
        ranks: the processes of this training, if there are several.
        restores_random_state: set torch's random state to the checkpoint's now. Otherwise the
            data provider does so.
        on_phase: is called with the progress of the work before the first step.
        model_batches: the batches of the language model in that work, if there is one.

    Raises:
        Interrupted: `stop` requested it. A checkpoint is saved, unless there is no step yet.
        NonFiniteBatchError: too many bad batches in a row. The last good step is saved.
        RankLostError: another process has ended. Rank 0 has saved the last complete step.
    """
    writes = ranks is None or ranks.rank == 0
    max_over_ranks = int if ranks is None else ranks.max_over_ranks
    before = 0 if checkpoint is None else skipped_batches(checkpoint)
    guard = BadBatchGuard(trainer, max_bad_batches, max_over_ranks, before)
    context = None if ranks is None else AcrossRanks(ranks)
    exchange = [] if ranks is None or context is None else [RankExchange(trainer, ranks, context)]
    stop_request = StopRequest(stop, max_over_ranks)
    watched = model_batches if ranks is None else None
    before_step_1 = BeforeFirstStep(
        trainer, stop_request, on_phase if writes else ignore_phase, watched
    )
    supervision: list[Hook] = [
        *hooks,
        *exchange,
        guard,
        DeferredUpdates(trainer, context),
        stop_request,
        Checkpointer(trainer, keep, config, lambda: {"skipped_batches": guard.skipped}, writes),
        before_step_1,
    ]
    if writes:
        supervision.append(CollapseWarning(trainer))
    if checkpoint is not None:
        _finish_resuming(trainer)
        if restores_random_state:
            load_random_state(checkpoint)

    def save() -> Path | None:
        if not before_step_1.started:
            return checkpoint
        stop.saving = True
        trainer.save_checkpoint(str(trainer.n_training_samples))
        if ranks is not None:
            ranks.wait_for_others()  # torchrun may kill the others when one process ends
        return Path(trainer.cfg.checkpoint_path or "") / str(trainer.n_training_samples)

    if checkpoint is not None and _is_finished(trainer):
        saved = read_json(checkpoint / SAE_CFG_FILENAME)
        for name in CHANGED_BY_FOLDING:
            if name in saved:
                setattr(trainer.sae.cfg, name, saved[name])
        trainer.set_final_sae_metadata()
        return guard.skipped
    with supervise(trainer, supervision):
        try:
            trainer.fit()
        except StopRequested:
            raise Interrupted(save(), stop.signal_number or signal.SIGINT) from None
        except NonFiniteBatchError as error:
            saved = save()
            raise NonFiniteBatchError(f"{error}; saved {saved}" if saved else str(error)) from None
        except RankLostError as error:
            saved = save()
            result = f"saved {saved}" if saved else "there is no complete step to save"
            if not writes:
                result = "rank 0 saves the last complete step, unless it has ended"
            raise RankLostError(f"{error}; {result}") from error
    return guard.skipped


def _finish_resuming(trainer: SAETrainer[Any, Any]) -> None:
    """Correct what SAELens stores: counts before the last step, and when lr begins to decay."""
    samples = trainer.n_training_samples
    trainer.n_training_steps = samples // trainer.cfg.train_batch_size_samples
    trainer.checkpoint_thresholds = [t for t in trainer.checkpoint_thresholds if t >= samples]
    # An extended run decays lr later than the run of the checkpoint.
    schedule, cfg = trainer.lr_scheduler.state_dict(), trainer.cfg
    if "_milestones" in schedule and cfg.lr_decay_steps > 0:
        schedule["_milestones"][-1] = cfg.total_training_steps - cfg.lr_decay_steps
        trainer.lr_scheduler.load_state_dict(schedule)


def _is_finished(trainer: SAETrainer[Any, Any]) -> bool:
    """Return whether the trainer was loaded from the checkpoint after the last step.

    SAELens has folded the scale of the activations into the weights by then, and `trainer.fit`
    would estimate it and fold it again.
    """
    scaler, total = trainer.activation_scaler, trainer.cfg.total_training_samples
    is_folded = scaler.scaling_factor is None and scaler.whitening is None
    return trainer.n_training_samples >= total and is_folded


class RunContext(NamedTuple):
    """What a run is trained with, beside its settings: the arguments of `train`."""

    checkpoint: Path | None
    on_step: OnStep | None
    stop: StopFlag
    keep: int | None
    ranks: Ranks | None
    last_batch: LastBatch
    on_phase: OnPhase = ignore_phase

    @property
    def writes(self) -> bool:
        """Whether this process writes files."""
        return self.ranks is None or self.ranks.rank == 0

    def fit(
        self,
        trainer: SAETrainer[Any, Any],
        run: Run,
        *hooks: Hook,
        restores_random_state: bool = True,
        model_batches: ModelBatches | None = None,
    ) -> int:
        """Train, and return the number of skipped batches."""
        observers: list[Hook] = []
        if self.writes:
            self.last_batch.trainer = trainer
            folder = Path(run.runner.output_path or "")
            points = curve_points(trainer.cfg.total_training_steps)
            observers = [
                self.last_batch,
                History(trainer, folder, self.checkpoint),
                LatentHistory(trainer, folder, points, self.checkpoint),
            ]
        if self.on_step is not None:
            observers.append(StepCallback(trainer, self.on_step))
        return fit(
            trainer,
            self.stop,
            self.checkpoint,
            hooks=[*hooks, *observers],
            max_bad_batches=run.max_bad_batches,
            keep=self.keep,
            config=run_config(run),
            ranks=self.ranks,
            restores_random_state=restores_random_state,
            on_phase=self.on_phase,
            model_batches=model_batches,
        )


class PreparedRun(NamedTuple):
    """A run whose model and data are loaded."""

    fit: Callable[[], tuple[TrainingSAE[Any], int]]
    """Trains and saves. Returns the SAE and the number of skipped batches."""
    evaluate: Callable[[TrainingSAE[Any]], dict[str, float]]

    def evaluate_safely(
        self, sae: TrainingSAE[Any], output: Path, last_batch: LastBatch
    ) -> tuple[dict[str, float], float]:
        """Evaluate the SAE and save the figures. An error is only a warning.

        Returns:
            The figures, and the mean L0 of the saved SAE on the last batch.
        """
        saved_l0 = float("nan")
        figures: dict[str, float] = {}
        try:
            saved_l0 = last_batch.saved_l0(output, str(sae.device))
            figures = self.evaluate(sae)
            if figures:
                write_text(output / "eval_stats.json", to_json(figures))
        except Exception as error:  # Catch any error, because the trained SAE must not be lost.
            warnings.warn(
                f"the SAE is saved, but evaluating it failed ({with_type(error)})", stacklevel=2
            )
        return figures, saved_l0
