"""Runs on synthetic data."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import wandb
from sae_lens import LoggingConfig, SAETrainer, TrainingSAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.synthetic import SyntheticModel, eval_sae_on_synthetic_data
from sae_lens.synthetic.training import SyntheticActivationIterator
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.types import DataProvider
from safetensors.torch import save_file

from sae_lens_atm.data.synthetic import build_hierarchy_model
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.evaluation.synthetic import evaluate
from sae_lens_atm.files import saved_at_once
from sae_lens_atm.training.checkpoints import reading, run_config
from sae_lens_atm.training.fit import PreparedRun, RunContext
from sae_lens_atm.training.run_file import SyntheticRun


def build_synthetic_model(run: SyntheticRun) -> SyntheticModel:
    """Return the synthetic model of a run. Its features do not depend on the run's seed."""
    if run.hierarchy is not None:
        return build_hierarchy_model(run.hierarchy, run.runner.device)
    return SyntheticModel.load_from_source(run.runner.synthetic_model, run.runner.device)


def prepare_synthetic(run: SyntheticRun, context: RunContext) -> PreparedRun:
    """Make model, SAE and trainer of a run.

    Raises:
        SettingsError: sae.d_in does not fit the synthetic model.
    """
    cfg = run.runner
    model = build_synthetic_model(run)
    if model.cfg.hidden_dim != cfg.sae.d_in:
        raise SettingsError(
            f"sae.d_in must be {model.cfg.hidden_dim}, the hidden_dim of the synthetic model, got "
            f"{cfg.sae.d_in}"
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

    return PreparedRun(fit_and_save, final_evaluation)


def _wandb_run(logger: LoggingConfig, config: dict[str, Any]) -> AbstractContextManager[Any]:
    """Open the wandb run to which SAELens' trainer logs, if the run file asks for one."""
    if not logger.log_to_wandb:
        return nullcontext()
    return wandb.init(
        project=logger.wandb_project,
        entity=logger.wandb_entity,
        config=config,
        name=logger.run_name,
        id=logger.wandb_id,
    )
