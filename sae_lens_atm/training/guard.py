"""Steps that are complete or have no effect: bad batches are skipped, updates are delayed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar, cast

import torch
from sae_lens import SAETrainer
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.errors import NonFiniteBatchError, RankLostError
from sae_lens_atm.method.step_context import StepContext
from sae_lens_atm.sae.atm_sae import ATMTrainingSAE
from sae_lens_atm.training.supervise import Forward, Hook, Step, replace_attribute

_Function = TypeVar("_Function", bound=Callable[..., Any])
MaxOverRanks = Callable[[int], int]
"""Returns the largest of the numbers that the processes of a training pass."""


_DIVERGED = 1
"""What marks a step whose loss or gradients are not finite. 2: its batch is not finite, too."""


class _Rejected(Exception):
    pass


class BadBatchGuard(Hook):
    """Skips bad batches: the step is undone, and taken with the next good batch instead.

    A batch is bad if its loss or gradients are not finite. That is known after the backward pass,
    where one number is read from the device. It also says whether the batch itself was finite: if
    not, the data are at fault, and otherwise training has diverged. By then the forward pass has
    changed:

    - the trainer's counts and the SAE's own buffers (BatchTopK's threshold): copied before each
      step, and restored;
    - averages of `ATMTrainingSAE`: `DeferredUpdates` has not applied their updates yet;
    - parents of some latents (`ParentTracker.update_parents`). They need no copy. The search
      depends on the decoder, the averages and the step number, which a rejected step does not
      change. The repeated step searches again for the same latents, and finds the same parents.
    """

    def __init__(
        self,
        trainer: SAETrainer[Any, Any],
        max_bad_batches: int = 10,
        max_over_ranks: MaxOverRanks = int,
        skipped: int = 0,
    ) -> None:
        """
        Args:
            trainer: the trainer to guard.
            max_bad_batches: number of bad batches in a row at which training stops.
            max_over_ranks: agrees on bad batches with the other processes.
            skipped: number of batches skipped before, in a run that is resumed.
        """
        self.skipped = skipped
        self._trainer, self._max_bad_batches = trainer, max_bad_batches
        self._max_over_ranks = max_over_ranks
        self._in_a_row = 0
        self._finite_in_a_row = 0
        self._badness = 0
        self._input_is_bad = torch.zeros((), dtype=torch.bool)
        self._loss = torch.zeros(())
        self._norms: list[Tensor] = []
        self._copies: list[Tensor] = []

    @override
    def attach(self, undo: ExitStack) -> None:
        for parameter in self._trainer.sae.parameters():
            undo.callback(parameter.register_post_accumulate_grad_hook(self._add_norm).remove)

    def _add_norm(self, parameter: Tensor) -> None:
        # Before gradients are clipped, which turns infinity into 0 or NaN.
        if parameter.grad is not None:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            self._norms.append(torch.linalg.vector_norm(parameter.grad, dtype=dtype))

    @override
    def wrap_forward(self, forward: Forward) -> Forward:
        def forward_and_keep_loss(step_input: TrainStepInput) -> TrainStepOutput:
            output = forward(step_input)
            self._input_is_bad = ~step_input.sae_in.isfinite().all()
            self._loss = output.loss.detach()
            return output

        return forward_and_keep_loss

    @override
    def before_update(self) -> None:
        norm = torch.linalg.vector_norm(torch.stack(self._norms))
        is_bad = ~(norm.isfinite() & self._loss.isfinite())
        self._badness = self._max_over_ranks(int(is_bad * (_DIVERGED + self._input_is_bad)))
        if self._badness:
            raise _Rejected

    @override
    def wrap_step(self, step: Step) -> Step:
        trainer = self._trainer

        def step_on_good_batch(batch: Tensor) -> TrainStepOutput:
            while True:
                counts = trainer.n_training_samples, trainer.n_frac_active_samples
                self._copy()
                self._norms.clear()
                try:
                    output = step(batch)
                except (_Rejected, RankLostError) as error:
                    trainer.n_training_samples, trainer.n_frac_active_samples = counts
                    trainer.optimizer.zero_grad()
                    self._restore()
                    if isinstance(error, RankLostError):
                        raise
                else:
                    self._in_a_row = self._finite_in_a_row = 0
                    output.metrics["skipped_batches"] = self.skipped
                    return output
                self._count_bad(self._badness == _DIVERGED)
                batch = next(trainer.data_provider)

        return step_on_good_batch

    def _saved(self) -> list[Tensor]:
        trainer = self._trainer
        counted = trainer.act_freq_scores, trainer.n_forward_passes_since_fired
        return [*trainer.sae.buffers(recurse=False), *counted]

    def _copy(self) -> None:
        if not self._copies:
            self._copies = [torch.empty_like(tensor) for tensor in self._saved()]
        for copy, tensor in zip(self._copies, self._saved(), strict=True):
            copy.copy_(tensor)

    def _restore(self) -> None:
        for copy, tensor in zip(self._copies, self._saved(), strict=True):
            tensor.copy_(copy)

    def _count_bad(self, is_finite: bool = False) -> None:
        self.skipped += 1
        self._in_a_row += 1
        self._finite_in_a_row += is_finite
        if self._in_a_row < self._max_bad_batches:
            return
        trainer = self._trainer
        where = f"{self._in_a_row} bad batches in a row at step {trainer.n_training_steps}"
        if self._finite_in_a_row < self._in_a_row:
            raise NonFiniteBatchError(
                f"{where}: {self._in_a_row - self._finite_in_a_row} of them hold NaN, Inf or too "
                "large values. Check the activations, or increase max_bad_batches"
            )
        raise NonFiniteBatchError(
            f"{where}: training diverged. The batches are finite, but the loss or its gradients "
            f"are not. lr is {trainer.cfg.lr:g}, dtype is {str(trainer.sae.dtype)[6:]!r}: train "
            "again with a lower lr, or with dtype 'float32'"
        )

    @override
    def wrap_batches(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        for batch in batches:
            if self._max_over_ranks(int(not batch.norm(dim=-1).isfinite().all())):
                self._count_bad()
            else:
                self._in_a_row = self._finite_in_a_row = 0
                yield batch


def not_compiled(function: _Function) -> _Function:
    """Keep a function out of the graphs of `torch.compile`."""
    return cast(_Function, torch.compiler.disable(function))


class UpdateQueue(StepContext):
    """A step context that queues updates."""

    def __init__(self) -> None:
        self.updates: list[Callable[[], None]] = []

    @override
    @not_compiled
    def after_step(self, update: Callable[[], None]) -> None:
        self.updates.append(update)


class DeferredUpdates(Hook):
    """Applies the updates of an `ATMTrainingSAE` only when the step is accepted.

    That is after the backward pass, just before the optimizer changes the weights. Put this hook
    behind the `BadBatchGuard`, so that its check comes first. For other SAEs this does nothing.
    """

    def __init__(self, trainer: SAETrainer[Any, Any], queue: UpdateQueue | None = None) -> None:
        self._trainer, self._queue = trainer, queue or UpdateQueue()

    @override
    def attach(self, undo: ExitStack) -> None:
        if isinstance(self._trainer.sae, ATMTrainingSAE):
            replace_attribute(self._trainer.sae, "context", self._queue, undo)

    @override
    def wrap_forward(self, forward: Forward) -> Forward:
        def forward_and_queue(step_input: TrainStepInput) -> TrainStepOutput:
            self._queue.updates.clear()  # those of a rejected step
            return forward(step_input)

        return forward_and_queue

    @override
    def before_update(self) -> None:
        for update in self._queue.updates:
            update()
        self._queue.updates.clear()
