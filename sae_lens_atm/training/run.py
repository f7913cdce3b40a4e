"""Training a run with SAELens' trainer and runner, on synthetic data or on a language model."""

import json
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import wandb
from sae_lens import LanguageModelSAETrainingRunner, LoggingConfig, SAETrainer, TrainingSAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.llm_sae_training_runner import LLMSaeEvaluator
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.synthetic import SyntheticModel, eval_sae_on_synthetic_data
from sae_lens.synthetic.training import SyntheticActivationIterator
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.types import DataProvider
from safetensors.torch import save_file
from torch import Tensor
from torch.random import fork_rng
from typing_extensions import override

from sae_lens_atm.data.activation_stream import ActivationStream
from sae_lens_atm.data.language_model import check_hook, saved_dataset
from sae_lens_atm.data.synthetic import build_hierarchy_model
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.synthetic import evaluate
from sae_lens_atm.files import saved_at_once, to_json, write_text
from sae_lens_atm.training.checkpoints import newest_checkpoint, reading, run_config
from sae_lens_atm.training.fit import fit
from sae_lens_atm.training.hooks import OnStep, StepCallback, StopFlag
from sae_lens_atm.training.parallel import share_store
from sae_lens_atm.training.preflight.checks import check_devices, check_run
from sae_lens_atm.training.ranks import Ranks, gpu_settings, joined
from sae_lens_atm.training.run_file import LanguageModelRun, Run, SyntheticRun
from sae_lens_atm.training.supervise import Hook, Step


@dataclass
class Result:
    """A finished run."""

    sae: TrainingSAE[Any]
    output_path: Path
    seconds: float
    figures: dict[str, float] = field(default_factory=dict[str, float])
    """Figures of the final evaluation."""
    skipped_batches: int = 0
    """Number of bad batches (NaN, Inf, overflow) that were skipped."""


def train(
    run: Run,
    resume: str | Path | None = None,
    on_step: OnStep | None = None,
    stop: StopFlag | None = None,
    keep: int | None = None,
) -> Result:
    """Train a run to its end and save the SAE in its `output_path`.

    Under torchrun, each process trains on its share of the batches. Rank 0 saves and evaluates.

    Args:
        run: the run to train.
        resume: a checkpoint to resume from, or the folder of a run (its newest checkpoint).
        on_step: called after each training step, with the trainer and the step's output.
        stop: requests a stop from outside. Signals do, too.
        keep: number of checkpoints to keep, the newest; None keeps all.

    Raises:
        Interrupted: a signal or `stop` requested it. A checkpoint is saved.
        SettingsError, CheckpointError: run, data or checkpoint do not fit. Nothing was trained.
        NonFiniteBatchError: too many bad batches in a row. The last good step is saved.
        RankLostError: another process has ended. Rank 0 has saved the last complete step.
    """
    checkpoint = None if resume is None else newest_checkpoint(resume)
    check_run(run, checkpoint)
    return train_checked(run, checkpoint, on_step, stop, keep)


def train_checked(
    run: Run,
    checkpoint: Path | None = None,
    on_step: OnStep | None = None,
    stop: StopFlag | None = None,
    keep: int | None = None,
) -> Result:
    """Train as `train`, after `newest_checkpoint` and `check_run` were called."""
    check_devices(run)
    stop = stop or StopFlag()
    with joined(run) as ranks, fork_rng({*gpu_settings(run).values()}):
        torch.manual_seed(run.seed)
        output = Path(run.runner.output_path or "")
        output.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        context = _Context(checkpoint, on_step, stop, keep, ranks)
        prepared = (
            _prepare_synthetic(run, context)
            if isinstance(run, SyntheticRun)
            else _prepare_language_model(run, context)
        )
        with stop.on_signals():  # also while the result is saved
            sae, skipped = prepared.fit()
        sae.eval()
        figures = prepared.evaluate_safely(sae, output) if context.writes else {}
        return Result(sae, output, time.perf_counter() - start, figures, skipped)


class _Context(NamedTuple):
    checkpoint: Path | None
    on_step: OnStep | None
    stop: StopFlag
    keep: int | None
    ranks: Ranks | None

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
    ) -> int:
        """Train, and return the number of skipped batches."""
        callbacks = [] if self.on_step is None else [StepCallback(trainer, self.on_step)]
        return fit(
            trainer,
            self.stop,
            self.checkpoint,
            hooks=[*hooks, *callbacks],
            max_bad_batches=run.max_bad_batches,
            keep=self.keep,
            config=run_config(run),
            ranks=self.ranks,
            restores_random_state=restores_random_state,
        )


class _Prepared(NamedTuple):
    """A run whose model and data are loaded."""

    fit: Callable[[], tuple[TrainingSAE[Any], int]]
    """Trains and saves. Returns the SAE and the number of skipped batches."""
    evaluate: Callable[[TrainingSAE[Any]], dict[str, float]]

    def evaluate_safely(self, sae: TrainingSAE[Any], output: Path) -> dict[str, float]:
        """Evaluate the SAE and save the figures. An error is only a warning."""
        figures: dict[str, float] = {}
        try:
            figures = self.evaluate(sae)
            if figures:
                write_text(output / "eval_stats.json", to_json(figures))
        except Exception as error:  # any error: the trained SAE must not be lost to it
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"the SAE is saved, but evaluating it failed ({reason})", stacklevel=2)
        return figures


# --- synthetic data ------------------------------------------------------------------------------


def build_synthetic_model(run: SyntheticRun) -> SyntheticModel:
    """Return the synthetic model of a run. Its features do not depend on the run's seed."""
    if run.hierarchy is not None:
        return build_hierarchy_model(run.hierarchy, run.runner.device)
    return SyntheticModel.load_from_source(run.runner.synthetic_model, run.runner.device)


def _prepare_synthetic(run: SyntheticRun, context: _Context) -> _Prepared:
    cfg = run.runner
    model = build_synthetic_model(run)
    if model.cfg.hidden_dim != cfg.sae.d_in:
        raise SettingsError(
            f"sae.d_in is {cfg.sae.d_in}: allowed is {model.cfg.hidden_dim}, the hidden_dim of "
            "the synthetic model"
        )
    sae = TrainingSAE[Any].from_dict(cfg.sae.to_dict()).to(cfg.device)

    def evaluator(sae: Any, _data: DataProvider, scaler: ActivationScaler) -> dict[str, Any]:
        result = eval_sae_on_synthetic_data(
            sae,
            model.feature_dict,
            model.activation_generator,
            cfg.eval_samples,
            cfg.batch_size,
            scaler,
        )
        return dict(result.to_log_dict(prefix="synthetic/"))

    data: DataProvider = SyntheticActivationIterator(
        model.feature_dict, model.activation_generator, cfg.batch_size, cfg.autocast_data
    )
    if context.ranks is not None:  # all ranks draw the same batch
        data = map(context.ranks.own_rows, data)
    trainer: SAETrainer[Any, Any] = SAETrainer(
        cfg=cfg.to_sae_trainer_config(),
        sae=sae,
        data_provider=data,
        evaluator=evaluator if cfg.eval_frequency > 0 else None,
    )
    if context.checkpoint is not None:
        with reading(context.checkpoint):
            trainer.load_trainer_state(context.checkpoint)
            sae.load_weights_from_checkpoint(context.checkpoint)
    config = run_config(run)

    def fit_and_save() -> tuple[TrainingSAE[Any], int]:
        with _wandb_run(cfg.logger, config):
            skipped = context.fit(trainer, run)
        if not context.writes:
            return sae, skipped
        with saved_at_once(Path(cfg.output_path or "")) as folder:
            sae.save_inference_model(folder)
            save_file({"sparsity": trainer.log_feature_sparsity}, folder / SPARSITY_FILENAME)
            text = json.dumps(config, indent=2)
            (folder / RUNNER_CFG_FILENAME).write_text(text, encoding="utf-8")
        if cfg.save_synthetic_model:
            model.save(Path(cfg.output_path or "") / "synthetic_model")
        return sae, skipped

    def final_evaluation(sae: TrainingSAE[Any]) -> dict[str, float]:
        if not cfg.run_final_eval or cfg.eval_samples <= 0:
            return {}
        # The seed of training would draw the samples of training again.
        return evaluate(sae, model, cfg.eval_samples, run.seed + 1, cfg.batch_size)

    return _Prepared(fit_and_save, final_evaluation)


def _wandb_run(logger: LoggingConfig, config: dict[str, Any]) -> AbstractContextManager[Any]:
    """SAELens' trainer logs to the wandb run that is open; its language-model runner opens one."""
    if not logger.log_to_wandb:
        return nullcontext()
    return wandb.init(
        project=logger.wandb_project,
        entity=logger.wandb_entity,
        config=config,
        name=logger.run_name,
        id=logger.wandb_id,
    )


# --- language models -----------------------------------------------------------------------------


class SupervisedRunner(LanguageModelSAETrainingRunner):
    """SAELens' language-model runner, which trains with `fit` and saves at once."""

    context: _Context
    run_settings: LanguageModelRun
    stream_hooks: tuple[Hook, ...] = ()
    skipped_batches: int = 0

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        self.skipped_batches = self.context.fit(
            trainer,
            self.run_settings,
            *self.stream_hooks,
            restores_random_state=not self.stream_hooks,
        )
        return trainer.sae

    @override
    def save_final_sae(
        self,
        sae: TrainingSAE[Any],
        output_path: str,
        log_feature_sparsity: Tensor | None = None,
    ) -> None:
        if self.context.writes:
            with saved_at_once(Path(output_path)) as folder:
                super().save_final_sae(sae, str(folder), log_feature_sparsity)


class StreamState(Hook):
    """Saves the position in the activation stream, behind the last batch that a step took."""

    def __init__(self, stream: ActivationStream) -> None:
        self._stream = stream
        self._batch: Tensor | None = None

    @override
    def wrap_step(self, step: Step) -> Step:
        def step_and_keep_batch(batch: Tensor) -> TrainStepOutput:
            self._batch = batch
            return step(batch)

        return step_and_keep_batch

    @override
    def on_checkpoint(self, folder: Path) -> None:
        if self._batch is not None:
            self._stream.save(folder, self._batch)


def _prepare_language_model(run: LanguageModelRun, context: _Context) -> _Prepared:
    cfg = run.runner
    cfg.resume_from_checkpoint = None if context.checkpoint is None else str(context.checkpoint)
    try:
        runner = SupervisedRunner(cfg, override_dataset=saved_dataset(cfg.dataset_path))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(
            f"cannot load model_name {cfg.model_name!r} with dataset_path {cfg.dataset_path!r}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    runner.context, runner.run_settings, store = context, run, runner.activations_store
    check_hook(runner.cfg, runner.model)
    if context.ranks is None:
        stream = ActivationStream(store, int(cfg.prefetch_llm_batches))
        runner.stream_hooks = (StreamState(stream),)
        load = stream.load
    else:  # the contents of the buffers depend on the number of ranks, and are not saved
        share_store(store, context.ranks)
        load = store.load_from_checkpoint
    if context.checkpoint is not None:
        # SAELens does this when prefetching has begun, with two threads that read the dataset.
        with reading(context.checkpoint):
            load(context.checkpoint)

    def fit_and_save() -> tuple[TrainingSAE[Any], int]:
        return runner.run(), runner.skipped_batches

    def final_evaluation(sae: TrainingSAE[Any]) -> dict[str, float]:
        evaluator: LLMSaeEvaluator[Any] = runner.evaluator
        groups = evaluator(sae, runner.activations_store, ActivationScaler())
        return {name: value for group in groups.values() for name, value in group.items()}

    return _Prepared(fit_and_save, final_evaluation)
