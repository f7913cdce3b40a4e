"""Steps that a bad batch would spoil: undone before they reach the weights, and counted.

A batch is bad if it holds NaN or Inf values, or such large ones that the loss or its gradients are
not finite. That is only known when the backward pass is over. By then the forward pass has changed
averages, thresholds and counts, which are copied before each step and put back. Nothing is read
from sae_lens_atm.errors import NonFiniteBatchError
from the device but one flag a step.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import SAETrainer
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.types import DataProvider
from torch import Tensor

from sae_lens_atm.errors import NonFiniteBatchError
from sae_lens_atm.training.replacing import replace


class _Spoiled(Exception):
    pass


@dataclass
class Guard:
    """Guards the steps of a trainer while `watching`."""

    trainer: SAETrainer[Any, Any]
    most_in_a_row: int
    of_all: Callable[[int], int] = int
    """The largest of the numbers of all processes of a training, which is to skip alike."""
    skipped: int = 0
    batch: Tensor | None = None
    """The last batch that a step took, good or bad."""
    _in_a_row: int = 0
    _loss: Tensor | None = None
    _norms: list[Tensor] = field(default_factory=list[Tensor])
    _copies: list[Tensor] = field(default_factory=list[Tensor])

    @contextmanager
    def watching(self) -> Generator[None]:
        trainer, sae = self.trainer, self.trainer.sae
        forward, scaler = sae.training_forward_pass, trainer.activation_scaler

        def watched(step_input: TrainStepInput) -> TrainStepOutput:
            output = forward(step_input=step_input)
            self._loss = output.loss.detach()
            return output

        with ExitStack() as undo:
            replace(sae, "training_forward_pass", watched, undo)
            for name in ("estimate_scaling_factor", "estimate_whitening"):
                replace(scaler, name, self._of_good_batches(getattr(scaler, name)), undo)
            hooks = [p.register_post_accumulate_grad_hook(self._note) for p in sae.parameters()]
            for hook in (*hooks, trainer.optimizer.register_step_pre_hook(self._check)):
                undo.callback(hook.remove)
            yield

    def step(self, step: Callable[[Tensor], TrainStepOutput], batch: Tensor) -> TrainStepOutput:
        """One step, on this batch or on the first good one after it.

        Raises:
            NonFiniteBatchError: there were too many bad ones; everything is as before the first.
        """
        trainer = self.trainer
        while True:
            self.batch = batch
            counts = trainer.n_training_samples, trainer.n_frac_active_samples
            self._copy()
            self._norms.clear()
            try:
                output = step(batch)
            except _Spoiled:
                trainer.n_training_samples, trainer.n_frac_active_samples = counts
                trainer.optimizer.zero_grad()
                self._put_back()
                self._count()
                batch = next(trainer.data_provider)
                continue
            self._in_a_row = 0
            output.metrics["skipped_batches"] = self.skipped
            return output

    def _changing(self) -> list[Tensor]:
        """What a forward pass changes: averages, thresholds, and what the trainer counts."""
        trainer = self.trainer
        counted = (trainer.act_freq_scores, trainer.n_forward_passes_since_fired)
        return [*trainer.sae.buffers(), *counted]

    def _copy(self) -> None:
        if not self._copies:
            self._copies = [torch.empty_like(tensor) for tensor in self._changing()]
        for copy, tensor in zip(self._copies, self._changing(), strict=True):
            copy.copy_(tensor)

    def _put_back(self) -> None:
        for copy, tensor in zip(self._copies, self._changing(), strict=True):
            tensor.copy_(copy)

    def _count(self) -> None:
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= self.most_in_a_row:
            raise NonFiniteBatchError(
                f"{self._in_a_row} batches in a row at step {self.trainer.n_training_steps} hold "
                "NaN or Inf values, or values too large to compute with"
            )

    def _note(self, parameter: Tensor) -> None:
        """The norm of a gradient, before it is clipped: clipping makes 0 or NaN of infinity."""
        if parameter.grad is not None:
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            self._norms.append(torch.linalg.vector_norm(parameter.grad, dtype=dtype))

    def _check(self, *_: object) -> None:
        total = torch.linalg.vector_norm(torch.stack(self._norms))
        finite = total.isfinite()
        if self._loss is not None:
            finite = finite & self._loss.isfinite()
        if self.of_all(int(not finite)):
            raise _Spoiled

    def _of_good_batches(self, estimate: Callable[..., None]) -> Callable[..., None]:
        def estimated(*, data_provider: DataProvider, **kwargs: Any) -> None:
            estimate(data_provider=self._good(data_provider), **kwargs)

        return estimated

    def _good(self, batches: DataProvider) -> Iterator[Tensor]:
        """Those whose norms are finite: what the scale of the activations is estimated from."""
        for batch in batches:
            if self.of_all(int(not batch.norm(dim=-1).isfinite().all())):
                self._count()
            else:
                self._in_a_row = 0
                yield batch
