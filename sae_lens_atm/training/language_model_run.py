"""Runs on the activations of a language model."""

from pathlib import Path
from typing import Any

from sae_lens import SAE, LanguageModelSAETrainingRunner, SAETrainer, TrainingSAE
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.data.activation_cache import POSITION_FILENAME
from sae_lens_atm.data.activation_stream import ActivationStream
from sae_lens_atm.data.language_model import load_language_model, saved_dataset
from sae_lens_atm.errors import CheckpointError, SettingsError, with_type
from sae_lens_atm.evaluation.language_model import (
    HeldOutTokens,
    hold_out,
    language_model_figures,
)
from sae_lens_atm.files import saved_at_once
from sae_lens_atm.training.before_first_step import ModelBatches
from sae_lens_atm.training.checkpoints import reading
from sae_lens_atm.training.fit import PreparedRun, RunContext
from sae_lens_atm.training.parallel import share_store
from sae_lens_atm.training.phases import LOADING_MODEL_AND_DATASET, OnPhase, Phase, ignore_phase
from sae_lens_atm.training.preflight.amounts import estimation_batches, llm_batches_of
from sae_lens_atm.training.run_file import LanguageModelRun
from sae_lens_atm.training.supervise import Hook, Step


class SupervisedRunner(LanguageModelSAETrainingRunner):
    """SAELens' language-model runner, which trains with `fit` and saves at once."""

    context: RunContext
    run_settings: LanguageModelRun
    stream_hooks: tuple[Hook, ...] = ()
    model_batches: ModelBatches | None = None
    skipped_batches: int = 0

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        self.skipped_batches = self.context.fit(
            trainer,
            self.run_settings,
            *self.stream_hooks,
            restores_random_state=not self.stream_hooks,
            model_batches=self.model_batches,
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


def prepare_language_model(run: LanguageModelRun, context: RunContext) -> PreparedRun:
    """Load model and dataset of a run, and restore the position in the activations.

    Raises:
        SettingsError: model or dataset cannot be loaded, or hook_name or sae.d_in do not fit.
        CheckpointError: the checkpoint is of a run that read cached activations.
    """
    cfg = run.runner
    if context.checkpoint is not None and (context.checkpoint / POSITION_FILENAME).exists():
        raise CheckpointError(
            f"cannot resume: the run of {context.checkpoint} read cached activations, set "
            "activations.cache"
        )
    cfg.resume_from_checkpoint = None if context.checkpoint is None else str(context.checkpoint)
    on_phase = context.on_phase if context.writes else ignore_phase
    on_phase(Phase(LOADING_MODEL_AND_DATASET))
    model = load_language_model(cfg)
    try:
        dataset = saved_dataset(cfg.dataset_path)
        runner = SupervisedRunner(cfg, override_dataset=dataset, override_model=model)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SettingsError(
            f"cannot use dataset_path {cfg.dataset_path!r} with model_name {cfg.model_name!r}: "
            f"{with_type(error)}"
        ) from error
    runner.context, runner.run_settings, store = context, run, runner.activations_store
    estimated = estimation_batches(run) * cfg.train_batch_size_tokens
    runner.model_batches = ModelBatches(
        store, llm_batches_of(cfg, 1), llm_batches_of(cfg, estimated + 1)
    )
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

    def final_evaluation(_: TrainingSAE[Any]) -> dict[str, float]:
        if cfg.n_eval_batches <= 0:
            return {}
        return figures_of_saved(run, runner.model, hold_out(store, cfg), on_phase)

    return PreparedRun(fit_and_save, final_evaluation)


def figures_of_saved(
    run: LanguageModelRun, model: Any, tokens: HeldOutTokens, on_phase: OnPhase
) -> dict[str, float]:
    """Return the figures of the SAE that a run has saved, loaded as its users load it."""
    cfg = run.runner
    sae = SAE[Any].load_from_disk(str(cfg.output_path), device=cfg.device)

    def on_batch(done: int, total: int) -> None:
        on_phase(Phase("evaluating", done, total, "batches"))

    return language_model_figures(sae, model, tokens, cfg, on_batch)[0]
