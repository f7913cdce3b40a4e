"""One training in several processes: each has its rows of every batch, all hold the same SAE.

    torchrun --nproc-per-node 4 -m sae_lens_atm train run.yaml

SAELens' trainer runs on every rank as if it were alone. What in a step is a mean, a sum, a choice
or an extreme over the batch is made one over all ranks' rows, so that the step is that of one
process with the whole batch, and the state after it the same on all ranks.

A step is all or nothing. All that ranks tell each other they tell before the optimiser moves the
weights, and what else a step leaves (averages, counts) is kept back until it has moved them. A
rank that loses the others thus still holds the last whole step.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from sae_lens import BatchTopKTrainingSAE, SAETrainer
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.types import DataProvider
from torch import Tensor
from torch.distributed import ReduceOp
from typing_extensions import override

from sae_lens_atm.errors import RankLostError
from sae_lens_atm.method.importance import Signals
from sae_lens_atm.method.statistics import BatchStatistics
from sae_lens_atm.method.step_context import StepContext
from sae_lens_atm.sae.atm_sae import ATMTrainingSAE
from sae_lens_atm.training.ranks import Ranks, largest_of_all
from sae_lens_atm.training.replacing import replace


def share_store(store: ActivationsStore, ranks: Ranks) -> None:
    """Let a store read this rank's rows of the dataset alone, and serve its share of a batch.

    Row `i` is that of rank `i` modulo their number, and positions are told in rows of the whole
    dataset: so any number of ranks can go on from the position of any other.
    """
    store.train_batch_size_tokens //= ranks.size
    whole = store.dataset
    if isinstance(whole, Dataset):
        store.dataset = whole.shard(ranks.size, ranks.rank, contiguous=False)
    elif isinstance(whole, IterableDataset):
        store.dataset = split_dataset_by_node(whole, ranks.rank, ranks.size)
    rows = store._iterate_raw_dataset  # pyright: ignore[reportPrivateUsage]

    def counted() -> Iterator[Any]:
        for row in rows():
            store.n_dataset_processed += ranks.size
            yield row
            store.n_dataset_processed -= 1  # which SAELens adds now

    store._iterate_raw_dataset = counted  # pyright: ignore


@contextmanager
def together(trainer: SAETrainer[Any, Any], ranks: Ranks) -> Generator[None]:
    """Within this, a step of the trainer is one on the rows of all ranks.

    The trainer's configuration is that of the whole: batch, steps and samples are those of all.
    """
    with ExitStack() as undo:
        _Together(trainer, ranks, undo)
        yield


class _Together:
    """What takes the place of a method is made by one here, from the method."""

    def __init__(self, trainer: SAETrainer[Any, Any], ranks: Ranks, undo: ExitStack) -> None:
        self._trainer, self._ranks, self._undo = trainer, ranks, undo
        self._kept_back: list[Callable[[], object]] = []
        self._fired = torch.empty(0)
        sae = trainer.sae
        for tensor in sae.state_dict().values():
            ranks.take(tensor)
        self._random_state = ranks.of_first(_random_state(trainer.cfg.device))
        _set_random_state(self._random_state)

        for parameter in sae.parameters():
            hook = parameter.register_post_accumulate_grad_hook(self._reduce_gradient)
            undo.callback(hook.remove)
        self._replace(trainer, "step", self._step)
        self._replace(trainer, "maybe_reset_sparsity", self._between_steps)
        self._replace(sae, "training_forward_pass", self._forward)
        for name in ("estimate_scaling_factor", "estimate_whitening"):
            self._replace(trainer.activation_scaler, name, self._estimate)
        if isinstance(sae, BatchTopKTrainingSAE):
            choice = sae.activation_fn
            sae.activation_fn = BatchTopKOfAll(sae.cfg.k, ranks)
            undo.callback(setattr, sae, "activation_fn", choice)
            if not isinstance(sae, ATMTrainingSAE):
                self._replace(sae, "update_topk_threshold", self._threshold)
        if isinstance(sae, ATMTrainingSAE):
            replace(sae, "context", AcrossRanks(ranks, self._kept_back), undo)

    def _replace(
        self, thing: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
    ) -> None:
        replace(thing, name, torch.compiler.disable(make(getattr(thing, name))), self._undo)

    def _reduce_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._ranks.mean(parameter.grad)

    # --- the trainer --------------------------------------------------------------------------

    def _between_steps(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def between_steps() -> dict[str, Any]:
            self._random_state = _random_state(self._trainer.cfg.device)
            return method()

        return between_steps

    def _step(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def step(batch: Tensor) -> TrainStepOutput:
            trainer = self._trainer
            samples, counted = trainer.n_training_samples, trainer.n_frac_active_samples
            silent_for = trainer.n_forward_passes_since_fired.clone()
            fired = trainer.act_freq_scores.clone()
            try:
                output = method(batch)
            except RankLostError:
                trainer.n_training_samples, trainer.n_frac_active_samples = samples, counted
                trainer.n_forward_passes_since_fired, trainer.act_freq_scores = silent_for, fired
                _set_random_state(self._random_state)
                raise
            trainer.n_training_samples = samples + self._ranks.size * len(batch)
            silent = self._fired == 0
            trainer.n_forward_passes_since_fired = (silent_for + 1).where(silent, 0.0)
            trainer.act_freq_scores = fired + self._fired
            for update in self._kept_back:
                update()
            self._kept_back.clear()
            return output

        return step

    def _estimate(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def estimate(d_in: int, data_provider: DataProvider, n_batches_for_norm_estimate: int):
            batches = map(self._ranks.rows_of_all, data_provider)
            method(d_in, batches, n_batches_for_norm_estimate)
            scaler = self._trainer.activation_scaler
            scaler.scaling_factor = self._ranks.of_first(scaler.scaling_factor)
            if scaler.whitening is not None:
                scaler.whitening = self._ranks.of_first(scaler.whitening.to(torch.device("cpu")))

        return estimate

    # --- the SAE ------------------------------------------------------------------------------

    def _later(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def later(*arguments: Any) -> None:
            self._kept_back.append(partial(method, *arguments))

        return later

    def _forward(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def training_forward_pass(step_input: TrainStepInput) -> TrainStepOutput:
            self._kept_back.clear()
            output = method(step_input)
            fired = output.feature_acts.detach().bool().float().sum(0)
            self._fired = self._ranks.total(fired.to_dense())
            return output

        return training_forward_pass

    def _threshold(self, method: Callable[..., Any]) -> Callable[..., Any]:
        later = self._later(method)

        def update_topk_threshold(acts: Tensor) -> None:
            values = (acts.values() if acts.is_sparse else acts).detach()
            positive = values.where(values > 0, torch.inf).flatten()
            least = torch.cat([positive, positive.new_full((1,), torch.inf)]).amin(0, keepdim=True)
            self._ranks.total(least, ReduceOp.MIN)
            later(least[least.isfinite()])

        return update_topk_threshold


class AcrossRanks(StepContext):
    """Reduces over the ranks, and queues updates until the step is complete."""

    def __init__(self, ranks: Ranks, queue: list[Callable[[], object]]) -> None:
        self._ranks, self._queue = ranks, queue

    @override
    @torch.compiler.disable
    def average(self, statistics: BatchStatistics) -> BatchStatistics:  # pyright: ignore[reportIncompatibleMethodOverride]
        *signals, energy = (*statistics.signals, statistics.energy)
        measured = statistics.measured.float()
        parts = [*signals, energy, measured, statistics.mean_input]
        dtype = torch.promote_types(energy.dtype, torch.float32)
        whole = self._ranks.mean(torch.cat([part.to(dtype) for part in parts]))
        means = [
            values.to(part.dtype)
            for values, part in zip(whole.split([len(p) for p in parts]), parts, strict=True)
        ]
        return BatchStatistics(
            signals=Signals(*means[:3]),
            energy=means[3],
            measured=means[4] == 1,
            mean_input=means[5],
            inputs=lambda: self._ranks.mean(statistics.inputs()),
        )

    @override
    @torch.compiler.disable
    def minimum(self, values: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        positive = values.where(values > 0, torch.inf).flatten()
        least = torch.cat([positive, positive.new_full((1,), torch.inf)]).amin(0, keepdim=True)
        self._ranks.total(least, ReduceOp.MIN)
        return least[least.isfinite()]

    @override
    @torch.compiler.disable
    def largest(self, values: Tensor, per_row: float) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return largest_of_all(values, int(per_row * len(values) * self._ranks.size), self._ranks)

    @override
    def after_step(self, update: Callable[[], None]) -> None:
        self._queue.append(update)


class BatchTopKOfAll(BatchTopK):
    """SAELens' BatchTopK, choosing among the activations of all ranks in training."""

    def __init__(self, k: float, ranks: Ranks) -> None:
        super().__init__(k)
        self._ranks = ranks

    @override
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self.training:
            return super().forward(x)
        flat = x.relu().flatten()
        count = int(self.k * x.shape[:-1].numel() * self._ranks.size)
        places, _ = largest_of_all(flat.detach(), count, self._ranks)
        return torch.zeros_like(flat).scatter(0, places, flat[places]).reshape(x.shape)


def _random_state(device: str) -> tuple[Tensor, Tensor | None]:
    cuda = torch.device(device).type == "cuda"
    return torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
