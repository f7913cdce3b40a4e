"""One training in several processes, each with its rows of every batch and a copy of the SAE.

    torchrun --nproc-per-node 4 -m sae_lens_atm train run.yaml

SAELens' trainer runs on every rank. Means, sums, selections and extremes over a batch are computed
over the rows of all ranks. Each step therefore equals the step of one process with the whole batch,
and all ranks have the same state after it.

A step is complete on a rank or has no effect there. All exchanges of a step come before the
optimizer changes the weights, and a rank that loses another undoes the step (`BadBatchGuard`).
"""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from sae_lens import BatchTopKTrainingSAE, SAETrainer
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from torch.distributed import ReduceOp
from typing_extensions import override

from sae_lens_atm.errors import RankLostError
from sae_lens_atm.method.importance import Signals
from sae_lens_atm.method.statistics import BatchStatistics
from sae_lens_atm.sae.activations import BatchTopKATM
from sae_lens_atm.training.guard import UpdateQueue, not_compiled
from sae_lens_atm.training.ranks import Ranks, largest_across_ranks
from sae_lens_atm.training.supervise import Forward, Hook, Step, replace_attribute


def share_store(store: ActivationsStore, ranks: Ranks) -> None:
    """Let an activation store read this rank's rows of the dataset, and serve its share of a batch.

    Row `i` belongs to rank `i` modulo the number of ranks. The store counts rows of the whole
    dataset, so that a checkpoint can be resumed with any number of ranks.
    """
    store.train_batch_size_tokens //= ranks.size
    whole = store.dataset
    if isinstance(whole, Dataset):
        store.dataset = whole.shard(ranks.size, ranks.rank, contiguous=False)
    elif isinstance(whole, IterableDataset):
        store.dataset = split_dataset_by_node(whole, ranks.rank, ranks.size)
    rows = store._iterate_raw_dataset  # pyright: ignore[reportPrivateUsage]

    def counted_rows() -> Iterator[Any]:
        for row in rows():
            store.n_dataset_processed += ranks.size
            yield row
            store.n_dataset_processed -= 1  # SAELens adds 1 now

    store._iterate_raw_dataset = counted_rows  # pyright: ignore


class AcrossRanks(UpdateQueue):
    """The context of an `ATMTrainingSAE` that reduces over the ranks, and queues updates."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks

    @override
    @not_compiled
    def average(self, statistics: BatchStatistics) -> BatchStatistics:
        # A rank whose batch is not finite measures no latent. Then no rank does.
        usable = statistics.measured.any().reshape(1)
        parts = [*statistics.signals, statistics.energy, statistics.mean_input, usable]
        dtype = torch.promote_types(statistics.energy.dtype, torch.float32)
        means = self._ranks.mean_(torch.cat([part.to(dtype) for part in parts]))
        split = means.split([len(part) for part in parts])
        *signals, energy, mean_input = (
            mean.to(part.dtype) for mean, part in zip(split[:-1], parts[:-1], strict=True)
        )
        return BatchStatistics(
            signals=Signals(*signals),
            energy=energy,
            mean_input=mean_input,
            inputs=lambda: self._ranks.mean_(statistics.inputs()),
            measured=statistics.measured & (split[-1] == 1),
        )

    @override
    @not_compiled
    def minimum(self, values: Tensor) -> Tensor:
        positive = values.where(values > 0, torch.inf).flatten()
        least = torch.cat([positive, positive.new_full((1,), torch.inf)]).amin(0, keepdim=True)
        self._ranks.reduce_(least, ReduceOp.MIN)
        return least[least.isfinite()]

    @override
    @not_compiled
    def anywhere(self, flags: Tensor) -> Tensor:
        return self._ranks.reduce_(flags.float(), ReduceOp.MAX) > 0

    @override
    @not_compiled
    def largest(self, values: Tensor, per_row: float) -> tuple[Tensor, Tensor]:
        count = int(per_row * len(values) * self._ranks.size)
        return largest_across_ranks(values, count, self._ranks)


class RankExchange(Hook):
    """Makes each step of the trainer one step on the rows of all ranks.

    In the trainer's configuration, batch size and samples are totals over all ranks.

    Args:
        trainer: the trainer of this rank.
        ranks: the processes.
        context: where SAELens' own BatchTopK classes queue updates of their threshold.
    """

    def __init__(self, trainer: SAETrainer[Any, Any], ranks: Ranks, context: AcrossRanks) -> None:
        self._trainer, self._ranks, self._context = trainer, ranks, context
        self._fired = torch.empty(0)
        self._started = False

    @override
    def attach(self, undo: ExitStack) -> None:
        sae, ranks = self._trainer.sae, self._ranks
        for tensor in sae.state_dict().values():
            ranks.broadcast_(tensor)
        self._random_state = ranks.broadcast_object(_random_state(self._trainer.cfg.device))
        _set_random_state(self._random_state)
        for parameter in sae.parameters():
            hook = parameter.register_post_accumulate_grad_hook(self._average_gradient)
            undo.callback(hook.remove)
        if isinstance(sae, BatchTopKTrainingSAE):
            choice = BatchTopKAcrossRanks(sae.cfg.k, ranks)
            of_atm = isinstance(sae, BatchTopKATM)
            choice = sae.limited(choice) if of_atm else choice
            replace_attribute(sae, "activation_fn", choice, undo)
            if not of_atm:
                update = sae.update_topk_threshold
                replace_attribute(sae, "update_topk_threshold", self._queued(update), undo)

    def _average_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._ranks.mean_(parameter.grad)

    def _queued(self, update: Any) -> Any:
        @not_compiled
        def update_topk_threshold(acts: Tensor) -> None:
            values = (acts.values() if acts.is_sparse else acts).detach()
            self._context.after_step(partial(update, self._context.minimum(values)))

        return update_topk_threshold

    @override
    def between_steps(self) -> None:
        self._random_state = _random_state(self._trainer.cfg.device)
        if not self._started:  # the scale was estimated or loaded by now
            self._started = True
            scaler = self._trainer.activation_scaler
            scaler.scaling_factor = self._ranks.broadcast_object(scaler.scaling_factor)
            if scaler.whitening is not None:
                whitening = scaler.whitening.to(torch.device("cpu"))
                scaler.whitening = self._ranks.broadcast_object(whitening)

    @override
    def wrap_batches(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        return map(self._ranks.gather_rows, batches)

    @override
    def wrap_forward(self, forward: Forward) -> Forward:
        def forward_and_count(step_input: TrainStepInput) -> TrainStepOutput:
            output = forward(step_input)
            fired = output.feature_acts.detach().bool().float().sum(0)
            self._fired = self._ranks.reduce_(fired.to_dense())
            return output

        return forward_and_count

    @override
    def wrap_step(self, step: Step) -> Step:
        trainer = self._trainer

        def step_of_all(batch: Tensor) -> TrainStepOutput:
            samples = trainer.n_training_samples
            silent_for = trainer.n_forward_passes_since_fired.clone()
            fired = trainer.act_freq_scores.clone()
            try:
                output = step(batch)
            except RankLostError:
                _set_random_state(self._random_state)
                raise
            trainer.n_training_samples = samples + self._ranks.size * len(batch)
            silent = self._fired == 0
            trainer.n_forward_passes_since_fired = (silent_for + 1).where(silent, 0.0)
            trainer.act_freq_scores = fired + self._fired
            return output

        return step_of_all


class BatchTopKAcrossRanks(BatchTopK):
    """SAELens' BatchTopK, which in training selects among the activations of all ranks."""

    def __init__(self, k: float, ranks: Ranks) -> None:
        super().__init__(k)
        self._ranks = ranks

    @override
    @not_compiled
    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self.training:
            return super().forward(x)
        flat = x.relu().flatten()
        count = int(self.k * x.shape[:-1].numel() * self._ranks.size)
        places, _ = largest_across_ranks(flat.detach(), count, self._ranks)
        return torch.zeros_like(flat).scatter(0, places, flat[places]).reshape(x.shape)


def _random_state(device: str) -> tuple[Tensor, Tensor | None]:
    cuda = torch.device(device).type == "cuda"
    return torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
