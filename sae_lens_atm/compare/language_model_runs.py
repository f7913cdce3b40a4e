"""The SAEs of a comparison on a language model: all of one seed from one forward pass."""

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig, SAETrainer, TrainingSAE
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.load_model import load_model
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.util import temporary_seed
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.checkpoints import load_random_state, save_random_state
from sae_lens_atm.compare.history import HISTORY, History, curve_points
from sae_lens_atm.compare.kept import (
    FIGURES,
    MEASURED,
    TRAINING,
    is_evaluated,
    is_trained,
    write_json,
)
from sae_lens_atm.compare.matching import L0Controller
from sae_lens_atm.compare.planned import TRAINER_FIELDS, Planned
from sae_lens_atm.evaluation import is_signed
from sae_lens_atm.language_models import check_hook, saved_dataset
from sae_lens_atm.settings import LanguageModelRun, SettingsError
from sae_lens_atm.spelling.first_letters import (
    FirstLetters,
    figures_of,
    look_at_first_letters,
    scores_of,
)
from sae_lens_atm.train import saved_at_once
from sae_lens_atm.watch import Interrupted, NonFiniteBatchError, OnStep, StopFlag

_FIGURES = {
    "l0": "l0",
    "explained_variance": "explained_variance",
    "mse": "mse",
    "cossim": "cosine",
    "l2_ratio": "shrinkage",
    "ce_loss_score": "ce_loss_score",
    "kl_div_score": "kl_div_score",
}
"""SAELens' names of what it evaluates, and ours."""


@dataclass
class HeldOutTokens:
    """Tokens in the place of an activation store, the same for every SAE that is evaluated."""

    batches: list[Tensor]
    context_size: int
    store_batch_size_prompts: int
    _next: int = field(default=0, repr=False)

    def get_batch_tokens(self, _batch_size: int | None = None) -> Tensor:
        self._next += 1
        return self.batches[(self._next - 1) % len(self.batches)]

    def reset_input_dataset(self) -> None:
        self._next = 0


def hold_out(store: ActivationsStore, cfg: LanguageModelSAERunnerConfig[Any]) -> HeldOutTokens:
    """The first tokens of a store's dataset, on which it then does not train in its first epoch."""
    prompts = cfg.eval_batch_size_prompts or cfg.store_batch_size_prompts
    batches = [store.get_batch_tokens(prompts) for _ in range(max(cfg.n_eval_batches, 1))]
    return HeldOutTokens(batches, cfg.context_size, prompts)


class _GroupRunner(MultiSAETrainingRunner):
    """SAELens' runner of several SAEs, watched run by run, and stopped between steps."""

    planned: dict[str, Planned]
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
            knob = planned.knob
            controller = L0Controller(inner, knob, planned.l0) if knob.steered else None
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


def _with_own_settings(trainer: SAETrainer[Any, Any], planned: Planned) -> SAETrainer[Any, Any]:
    """A trainer with the learning rate and so on of its own entry: SAELens gives all the same."""
    cfg = planned.run.runner
    own = {name: getattr(cfg, name) for name in TRAINER_FIELDS if hasattr(cfg, name)}
    return SAETrainer(replace(trainer.cfg, **own), trainer.sae, trainer.data_provider)


def train_group(
    group: Sequence[Planned], folder: Path, points: int, on_step: OnStep, stop: StopFlag
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


def make_store(cfg: LanguageModelSAERunnerConfig[Any], model: Any) -> ActivationsStore:
    """SAELens' store of a run's tokens and activations."""
    dataset = saved_dataset(cfg.dataset_path)
    return ActivationsStore.from_config(model, cfg, override_dataset=dataset)


@torch.no_grad()
def evaluate_on_language_model(
    planned: Planned,
    folder: Path,
    model: Any,
    tokens: HeldOutTokens,
    letters: FirstLetters | None,
) -> None:
    """Evaluate a kept SAE as its users will load it, and keep the figures."""
    home = folder / planned.folder
    cfg = cast(LanguageModelRun, planned.run).runner
    sae = SAE[Any].load_from_disk(home / "sae", device=cfg.device)
    figures, alive = language_model_figures(sae, model, tokens, cfg)
    save_file({"alive": alive}, home / MEASURED)
    found: dict[str, Any] = {
        "evaluation_key": planned.evaluation_key,
        "figures": figures,
        "signed": is_signed(sae),
    }
    if letters is not None:
        scores = scores_of(sae, letters)
        figures |= figures_of(scores, letters)
        found["absorption_by_parent"] = scores.fraction_by_letter.tolist()
        found["parent_probability"] = letters.shares.tolist()
    write_json(home / FIGURES, found)


def language_model_figures(
    sae: SAE[Any], model: Any, tokens: HeldOutTokens, cfg: LanguageModelSAERunnerConfig[Any]
) -> tuple[dict[str, float], Tensor]:
    """SAELens' own figures of a SAE, and which of its latents fired."""
    tokens.reset_input_dataset()
    with_model = len(tokens.batches)
    evals = EvalConfig(
        batch_size_prompts=tokens.store_batch_size_prompts,
        n_eval_reconstruction_batches=with_model,
        n_eval_sparsity_variance_batches=with_model,
        compute_ce_loss=True,
        compute_kl=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    excluded = cfg.exclude_special_tokens

    def run(config: EvalConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        return run_evals(
            sae,
            cast(ActivationsStore, tokens),
            model,
            ActivationScaler(),
            config,
            model_kwargs=cfg.model_kwargs,
            exclude_special_tokens=excluded,
        )

    found: tuple[dict[str, Any], dict[str, Any]] | None = None
    with suppress(ZeroDivisionError):  # where ablating the hook changes nothing in the model
        found = run(evals)
    if found is None:
        tokens.reset_input_dataset()
        found = run(replace(evals, compute_ce_loss=False, compute_kl=False))
    groups, per_latent = found
    flat = {name: value for group in groups.values() for name, value in group.items()}
    figures = {ours: float(flat[name]) for name, ours in _FIGURES.items() if name in flat}
    alive = torch.tensor(per_latent["feature_density"]) > 0
    figures["dead_latents"] = int((~alive).sum())
    return figures, alive
