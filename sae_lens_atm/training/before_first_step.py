"""A hook for the work before the first step: shows its progress, and stops it on request."""

from collections.abc import Iterator
from contextlib import ExitStack
from threading import Lock
from typing import Any, NamedTuple

from sae_lens import SAETrainer
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.training.hooks import StopRequest, StopRequested
from sae_lens_atm.training.phases import OnPhase, Phase, ignore_phase
from sae_lens_atm.training.supervise import Hook, Step, replace_attribute

FILLING = "filling the activation buffer"
ESTIMATING = "estimating the scale of the activations"


class ModelBatches(NamedTuple):
    """The batches of the language model before the first step."""

    store: ActivationsStore
    fill: int
    """Number of batches for the first training batch."""
    estimate: int
    """Number of batches for the largest number of training batches that the estimate may take."""


class BeforeFirstStep(Hook):
    """Shows the filling of the buffer and the estimate of the scale, and stops them on request.

    A stop is answered before the next training batch of the estimate and before the first step. In
    a single process, it is answered before the next batch of the language model. There is nothing
    to save yet.

    Args:
        trainer: the trainer.
        stop: raises `StopRequested` when a stop is requested.
        on_phase: is called before each batch.
        model: the batches of the language model; None without a model, or if there are other
            processes, which would wait for a process that stops alone.

    Raises:
        StopRequested: from the iterators of batches.
    """

    def __init__(
        self,
        trainer: SAETrainer[Any, Any],
        stop: StopRequest,
        on_phase: OnPhase = ignore_phase,
        model: ModelBatches | None = None,
    ) -> None:
        self.started = False
        """Whether a step was taken or tried."""
        self._trainer, self._stop, self._on_phase, self._model = trainer, stop, on_phase, model
        self._computed = 0  # by the model
        self._taken = 0  # by the estimate
        self._is_estimating = False
        # With prefetching, the model runs in a thread. It must not stop once a step has begun,
        # because a checkpoint needs what is in the buffer.
        self._lock = Lock()
        self._has_stopped = False

    @override
    def attach(self, undo: ExitStack) -> None:
        if self._model is None:
            return
        store = self._model.store
        get_batch_tokens = store.get_batch_tokens

        def watched(*args: Any, **kwargs: Any) -> Tensor:
            with self._lock:
                if not self.started:
                    self._stop_if_requested()
            if not self.started:
                self._show()
                self._computed += 1
            return get_batch_tokens(*args, **kwargs)

        replace_attribute(store, "get_batch_tokens", watched, undo)

    @override
    def wrap_batches(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        while True:
            self._stop_if_requested()
            self._show()
            try:
                batch = next(batches)
            except StopIteration:
                return
            if not self._is_estimating:
                self._is_estimating = True
                self._show_filled()
            self._taken += 1
            yield batch

    @override
    def wrap_step(self, step: Step) -> Step:
        def step_after_phases(batch: Tensor) -> TrainStepOutput:
            with self._lock:
                if self._has_stopped:
                    raise StopRequested
                if not self.started:
                    self._show_end()
                    self._stop_if_requested()
                    self.started = True
            return step(batch)

        return step_after_phases

    def _stop_if_requested(self) -> None:
        try:
            self._stop.between_steps()
        except StopRequested:
            self._has_stopped = True
            raise

    def _show(self) -> None:
        most, model = "batches at most", self._model
        if model is None:
            total = self._trainer.cfg.n_batches_for_norm_estimate
            self._on_phase(Phase(ESTIMATING, self._taken, total, f"training {most}"))
        elif self._is_estimating:
            total = max(model.estimate, self._computed + 1)
            self._on_phase(Phase(ESTIMATING, self._computed, total, f"model {most}"))
        else:
            total = max(model.fill, self._computed + 1)
            self._on_phase(Phase(FILLING, self._computed, total, "model batches"))

    def _show_end(self) -> None:
        if self._is_estimating:
            self._on_phase(Phase(ESTIMATING, self._taken, self._taken, "training batches"))
        else:
            self._show_filled()

    def _show_filled(self) -> None:
        if self._computed:
            self._on_phase(Phase(FILLING, self._computed, self._computed, "model batches"))
