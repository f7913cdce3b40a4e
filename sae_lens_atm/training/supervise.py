"""Hooks around SAELens' trainer, attached and removed in one place.

The trainer is SAELens' own. `supervise` replaces its public methods `step`, `maybe_reset_sparsity`
and `save_checkpoint`, the SAE's `training_forward_pass`, and the two estimates of the activation
scaler, of which that of the scale ends earlier (`mean_norm`). At the end, also after an exception,
every attribute is restored.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sae_lens import SAETrainer
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from sae_lens_atm.training.scale import mean_norm

Step = Callable[[Tensor], TrainStepOutput]
Forward = Callable[[TrainStepInput], TrainStepOutput]
Save = Callable[[str, Path, list[str] | None], None]
"""Saves a checkpoint, given its name, the folder that contains it, and SAELens' wandb aliases."""


class Hook:
    """The methods that a hook may override. By default they change nothing.

    Wrappers are applied in the order of the hooks: the first hook is the innermost. All other
    methods are called in the order of the hooks.
    """

    def attach(self, undo: ExitStack) -> None:
        """Prepare for training. `undo` runs at the end of supervision."""

    def wrap_step(self, step: Step) -> Step:
        """Wrap `SAETrainer.step`, which takes one training step on a batch."""
        return step

    def wrap_forward(self, forward: Forward) -> Forward:
        """Wrap the forward pass of the SAE."""
        return forward

    def wrap_batches(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """Wrap the batches from which the scale of the activations is estimated."""
        return batches

    def wrap_save(self, save: Save) -> Save:
        """Wrap `SAETrainer.save_checkpoint`."""
        return save

    def between_steps(self) -> None:
        """Run before each step. An exception stops training here."""

    def before_update(self) -> None:
        """Run after the backward pass, before the optimizer changes the weights.

        An exception rejects the step.
        """

    def after_step(self, output: TrainStepOutput) -> None:
        """Run after each complete step, before `n_training_steps` counts it."""

    def on_checkpoint(self, folder: Path) -> None:
        """Add files to a checkpoint that SAELens has written."""


@contextmanager
def supervise(trainer: SAETrainer[Any, Any], hooks: Sequence[Hook]) -> Generator[None]:
    """Train under these hooks within this context."""
    sae, scaler = trainer.sae, trainer.activation_scaler
    step, forward, save = trainer.step, sae.training_forward_pass, trainer.save_checkpoint
    reset_sparsity = trainer.maybe_reset_sparsity

    def save_and_add_files(name: str, base: Path, aliases: list[str] | None) -> None:
        save(name, base_path=base, wandb_aliases=aliases)
        for hook in hooks:
            hook.on_checkpoint(base / name)

    wrapped_step: Step = step
    wrapped_forward: Forward = forward
    wrapped_save: Save = save_and_add_files
    for hook in hooks:
        wrapped_step = hook.wrap_step(wrapped_step)
        wrapped_forward = hook.wrap_forward(wrapped_forward)
        wrapped_save = hook.wrap_save(wrapped_save)

    def supervised_step(batch: Tensor) -> TrainStepOutput:
        output = wrapped_step(batch)
        for hook in hooks:
            hook.after_step(output)
        return output

    def supervised_forward(step_input: TrainStepInput) -> TrainStepOutput:
        # SAELens passes it by keyword. Wrappers may call it as they like.
        return wrapped_forward(step_input)

    def supervised_reset() -> dict[str, Any]:
        for hook in hooks:
            hook.between_steps()
        return reset_sparsity()

    def supervised_save(
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        base = base_path or trainer.cfg.checkpoint_path
        if base is None:  # only uploaded to wandb, from a temporary folder
            save(checkpoint_name, wandb_aliases=wandb_aliases)
        else:
            wrapped_save(checkpoint_name, Path(base), wandb_aliases)

    def supervised_batches(batches: Iterator[Tensor]) -> Iterator[Tensor]:
        for hook in hooks:
            batches = hook.wrap_batches(batches)
        return batches

    def estimate_scale(
        d_in: int, data_provider: Iterator[Tensor], n_batches_for_norm_estimate: int
    ) -> None:
        batches = supervised_batches(data_provider)
        scaler.scaling_factor = d_in**0.5 / mean_norm(batches, n_batches_for_norm_estimate)

    whiten = scaler.estimate_whitening

    def estimate_whitening(*, data_provider: Iterator[Tensor], **kwargs: Any) -> None:
        whiten(data_provider=supervised_batches(data_provider), **kwargs)

    def before_update(*_: object) -> None:
        for hook in hooks:
            hook.before_update()

    with ExitStack() as undo:
        for hook in hooks:
            hook.attach(undo)
        undo.callback(trainer.optimizer.register_step_pre_hook(before_update).remove)
        replace_attribute(trainer, "step", supervised_step, undo)
        replace_attribute(trainer, "maybe_reset_sparsity", supervised_reset, undo)
        replace_attribute(trainer, "save_checkpoint", supervised_save, undo)
        replace_attribute(sae, "training_forward_pass", supervised_forward, undo)
        replace_attribute(scaler, "estimate_scaling_factor", estimate_scale, undo)
        replace_attribute(scaler, "estimate_whitening", estimate_whitening, undo)
        yield


def replace_attribute(target: Any, name: str, value: Any, undo: ExitStack) -> None:
    """Replace an attribute of one object until `undo` runs."""
    is_own = name in vars(target) or name in vars(target).get("_modules", {})
    if is_own:
        undo.callback(setattr, target, name, getattr(target, name))
    else:  # the class has it
        undo.callback(delattr, target, name)
    setattr(target, name, value)
