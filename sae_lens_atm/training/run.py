"""Training a run with SAELens' trainer and runner, on synthetic data or on a language model."""

import json
import shutil
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import wandb
from sae_lens import (
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    SAETrainer,
    TrainingSAE,
)
from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.llm_sae_training_runner import LLMSaeEvaluator
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
from sae_lens_atm.evaluation.synthetic import evaluate, to_json
from sae_lens_atm.training.checkpoints import (
    newest_checkpoint,
    reading,
)
from sae_lens_atm.training.parallel import share_store
from sae_lens_atm.training.preflight.checks import check_devices, plan
from sae_lens_atm.training.ranks import Ranks, gpu_settings, joined
from sae_lens_atm.training.run_file import LanguageModelRun, Run, SyntheticRun
from sae_lens_atm.training.watch import OnStep, StopFlag, Watch


@dataclass
class Result:
    """A finished run."""

    sae: TrainingSAE[Any]
    output_path: Path
    seconds: float
    figures: dict[str, float] = field(default_factory=dict[str, float])
    """What the final evaluation found."""
    skipped_batches: int = 0
    """How many batches were skipped for their NaN, Inf or enormous values."""


def train(
    run: Run,
    resume: str | Path | None = None,
    on_step: OnStep | None = None,
    stop: StopFlag | None = None,
    keep: int | None = None,
) -> Result:
    """Train a run to its end and save the SAE in its `output_path`.

    Started by torchrun, in several processes, each has its share of the batches; the first saves
    and evaluates.

    Args:
        run: what to train.
        resume: a checkpoint to go on from, or the folder of a run (then its newest one).
        on_step: called after each training step.
        stop: asks for a stop from outside; signals set it too.
        keep: how many checkpoints to keep, the newest; all if None.

    Raises:
        Interrupted: a signal or `stop` asked for it; a checkpoint is there.
        SettingsError, CheckpointError: something does not fit, before any training.
        NonFiniteBatchError: too many bad batches in a row; the last good step is saved.
        RankLostError: another process is gone; the first has saved the last whole step.
    """
    plan(run, resume)
    check_devices(run)
    with joined(run) as ranks, fork_rng({*gpu_settings(run).values()}):
        torch.manual_seed(run.seed)
        return _train(run, resume, on_step, stop or StopFlag(), keep, ranks)


def _train(
    run: Run,
    resume: str | Path | None,
    on_step: OnStep | None,
    stop: StopFlag,
    keep: int | None,
    ranks: Ranks | None,
) -> Result:
    output = Path(run.runner.output_path or "")
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = None if resume is None else newest_checkpoint(resume)
    start = time.perf_counter()
    watch = Watch(on_step, stop, checkpoint, run.max_bad_batches, keep, ranks)
    prepare = _prepare_synthetic if isinstance(run, SyntheticRun) else _prepare_language_model
    job = prepare(cast(Any, run), watch)
    with stop.on_signals():  # until the result is saved, too
        sae = job.fit().eval()
    figures: dict[str, float] = {}
    if not watch.writes:
        return Result(sae, output, time.perf_counter() - start, {}, watch.skipped_batches)
    try:
        figures = job.evaluate(sae)
        if figures:
            (output / "eval_stats.json").write_text(to_json(figures), encoding="utf-8")
    except Exception as error:  # whatever it is, hours of training must not end in it
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"the SAE is saved, but evaluating it failed ({reason})", stacklevel=2)
    return Result(sae, output, time.perf_counter() - start, figures, watch.skipped_batches)


class _Job(NamedTuple):
    """The two halves of a run: training, which saves, and evaluating what came out."""

    fit: Callable[[], TrainingSAE[Any]]
    evaluate: Callable[[TrainingSAE[Any]], dict[str, float]]


@contextmanager
def saved_at_once(output: Path) -> Generator[Path]:
    """A folder to write a SAE in, whose files then move to `output`, last the one that makes that
    folder a SAE: what stands there is never half written."""
    partial = output / ".sae.partial"
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    for file in sorted(partial.iterdir(), key=lambda f: f.name == SAE_CFG_FILENAME):
        file.replace(output / file.name)
    partial.rmdir()


# --- synthetic data ------------------------------------------------------------------------------


def build_synthetic_model(run: SyntheticRun) -> SyntheticModel:
    """The synthetic model of a run; its directions do not depend on the run's seed."""
    if run.hierarchy is not None:
        return build_hierarchy_model(run.hierarchy, run.runner.device)
    return SyntheticModel.load_from_source(run.runner.synthetic_model, run.runner.device)


def _prepare_synthetic(run: SyntheticRun, watch: Watch) -> _Job:
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
    if watch.ranks is not None:  # all draw the same
        data = map(watch.ranks.own_rows, data)
    trainer: SAETrainer[Any, Any] = SAETrainer(
        cfg=cfg.to_sae_trainer_config(),
        sae=sae,
        data_provider=data,
        evaluator=evaluator if cfg.eval_frequency > 0 else None,
    )
    if watch.checkpoint is not None:
        with reading(watch.checkpoint):
            trainer.load_trainer_state(watch.checkpoint)
            sae.load_weights_from_checkpoint(watch.checkpoint)
    config = {**cfg.to_dict(), "seed": run.seed}
    if run.hierarchy is not None:  # which says what SAELens' config of the model cannot
        config["hierarchy_model"] = asdict(run.hierarchy)

    def fit() -> TrainingSAE[Any]:
        with _wandb_run(cfg.logger, config):
            watch.fit(trainer)
        if not watch.writes:
            return sae
        with saved_at_once(Path(cfg.output_path or "")) as folder:
            sae.save_inference_model(folder)
            save_file({"sparsity": trainer.log_feature_sparsity}, folder / SPARSITY_FILENAME)
            text = json.dumps(config, indent=2)
            (folder / RUNNER_CFG_FILENAME).write_text(text, encoding="utf-8")
        if cfg.save_synthetic_model:
            model.save(Path(cfg.output_path or "") / "synthetic_model")
        return sae

    def final_evaluation(sae: TrainingSAE[Any]) -> dict[str, float]:
        if not cfg.run_final_eval or cfg.eval_samples <= 0:
            return {}
        # Another seed than training's, which would draw the samples of training again.
        return evaluate(sae, model, cfg.eval_samples, run.seed + 1, cfg.batch_size)

    return _Job(fit, final_evaluation)


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


class WatchedRunner(LanguageModelSAETrainingRunner):
    """SAELens' language-model runner, stopping between steps and with a checkpoint."""

    watch: Watch
    stream: ActivationStream | None = None

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        return self.watch.fit(trainer)

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        super().save_checkpoint(checkpoint_path)
        guard, stream = self.watch.guard, self.stream
        if checkpoint_path is None or stream is None or guard is None or guard.batch is None:
            return
        stream.save(checkpoint_path, guard.batch)

    @override
    def save_final_sae(
        self,
        sae: TrainingSAE[Any],
        output_path: str,
        log_feature_sparsity: Tensor | None = None,
    ) -> None:
        if not self.watch.writes:
            return
        with saved_at_once(Path(output_path)) as folder:
            super().save_final_sae(sae, str(folder), log_feature_sparsity)


def _prepare_language_model(run: LanguageModelRun, watch: Watch) -> _Job:
    cfg = run.runner
    cfg.resume_from_checkpoint = None if watch.checkpoint is None else str(watch.checkpoint)
    try:
        runner = WatchedRunner(cfg, override_dataset=saved_dataset(cfg.dataset_path))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(
            f"cannot load model_name {cfg.model_name!r} with dataset_path {cfg.dataset_path!r}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    runner.watch, store = watch, runner.activations_store
    check_hook(runner.cfg, runner.model)
    if watch.ranks is None:
        watch.owns_random_state = False
        data = runner.stream = ActivationStream(store, int(cfg.prefetch_llm_batches))
        go_on = data.load
    else:  # what waits in the buffers is not saved, so that any number of processes can go on
        share_store(store, watch.ranks)
        go_on = store.load_from_checkpoint
    if watch.checkpoint is not None:
        # SAELens does so while prefetching has begun: two threads would draw on the data at once.
        with reading(watch.checkpoint):
            go_on(watch.checkpoint)

    def final_evaluation(sae: TrainingSAE[Any]) -> dict[str, float]:
        evaluator: LLMSaeEvaluator[Any] = runner.evaluator
        groups = evaluator(sae, runner.activations_store, ActivationScaler())
        return {name: value for group in groups.values() for name, value in group.items()}

    return _Job(runner.run, final_evaluation)
