"""The exact position in SAELens' activation store, saved and restored.

SAELens saves how many rows of the dataset were read. `ActivationStream` also saves the position in
token sequences and the activations that wait in the buffer. A resumed run then gets the batches
that it would have got without the stop.
"""

import inspect
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.mixing_buffer import mixing_buffer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae_lens_atm.data.random_state import load_random_state

STREAM_FILENAME = "activation_stream.safetensors"
MOST_BYTES = 8 * 2**30
"""Size up to which the activation buffer is saved, in bytes."""

# `torch.no_grad` has wrapped the generator function.
_mixing_buffer = inspect.unwrap(mixing_buffer)


class ActivationStream:
    """Follows an activation store that has not served any batch yet.

    Args:
        store: SAELens' store. Its dataset iterator and its batch iterator are replaced.
        prefetched: number of batches that may be computed ahead of training.
    """

    def __init__(self, store: ActivationsStore, prefetched: int = 0) -> None:
        self._store: Any = store
        self._sequences = 0
        self._recent: deque[Tensor] = deque(maxlen=prefetched + 2)
        self._waiting: Tensor | None = None
        self._kept: Tensor | None = None
        self._mixing: Generator[Tensor] | None = None
        self._checkpoint: Path | None = None
        if store.dataset is not None:
            self._tokenized = self._store._iterate_tokenized_sequences
            self._store._iterate_tokenized_sequences = self._counted
            self._store.iterable_sequences = self._counted()
        self._store.get_data_loader = self._served

    # --- serving -----------------------------------------------------------------------------

    def _counted(self) -> Iterator[Tensor]:
        """Yield the token sequences of one epoch, and count them."""
        self._sequences = 0
        for sequence in self._tokenized():
            self._sequences += 1
            yield sequence

    def _served(self) -> Iterator[Tensor]:
        if self._checkpoint is not None:  # in the thread that fills the buffer
            load_random_state(self._checkpoint)
        for batch in self._batches():
            self._recent.append(batch)
            yield batch

    def _batches(self) -> Iterator[Tensor]:
        store, size = self._store, self._store.train_batch_size_tokens
        while self._waiting is not None and len(self._waiting):
            batch, self._waiting = self._waiting[:size], self._waiting[size:]
            yield batch
        self._waiting = None
        buffer = store.n_batches_in_buffer * store.training_context_size
        mixing = _mixing_buffer(
            buffer, size, self._activations(), store.activations_mixing_fraction
        )
        self._mixing = mixing
        yield from mixing

    def _activations(self) -> Iterator[Tensor]:
        fresh = self._store._iterate_filtered_activations()
        if self._kept is not None:
            # Joined: the mixing buffer checks its size only after it got new activations.
            first = torch.cat([self._kept, next(fresh)])
            self._kept = None
            yield first
        yield from fresh

    # --- saving and loading ------------------------------------------------------------------

    def save(self, folder: Path, consumed: Tensor) -> None:
        """Save the position behind a batch. No batch may be served meanwhile.

        Args:
            folder: the checkpoint.
            consumed: the last batch that training took.
        """
        state = {"sequences": torch.tensor(self._sequences)}
        if hasattr(self._store, "current_row_idx"):
            state["row"] = torch.tensor(self._store.current_row_idx)
        waiting, kept = self._unserved(consumed)
        dtype = str(kept.dtype).removeprefix("torch.")
        buffered = {"waiting": _packed(waiting), "kept": _packed(kept)}
        size = sum(tensor.nbytes for tensor in buffered.values())
        if size <= MOST_BYTES:
            state |= buffered
        else:
            warnings.warn(
                f"the activation buffer has {size / 2**30:.1f} GiB and is not saved: a resumed "
                "run trains on other activations",
                stacklevel=2,
            )
        save_file(state, folder / STREAM_FILENAME, {"dtype": dtype})

    def _unserved(self, consumed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activations that would be served next, in order, and those to be mixed in."""
        if self._mixing is None:
            assert self._waiting is not None
            waiting, kept = self._waiting, self._kept
        else:
            # The buffers are local variables of SAELens' generator.
            buffer = inspect.getgeneratorlocals(self._mixing)
            served = (buffer["batch_idx"] + 1) * buffer["batch_size"]
            waiting, kept = buffer["serving_buffer"][served:], buffer["storage_buffer"]
        recent = list(self._recent)
        place = next(i for i, batch in enumerate(recent) if batch is consumed)
        assert kept is not None
        return torch.cat([*recent[place + 1 :], waiting]), kept

    def load(self, checkpoint: Path) -> None:
        """Restore the position of a checkpoint, before the first batch is served."""
        self._checkpoint = checkpoint
        path, store = checkpoint / STREAM_FILENAME, self._store
        if not path.exists():  # a checkpoint of SAELens
            store.load_from_checkpoint(checkpoint)
            return
        with safe_open(path, "pt", device=str(store.device)) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            dtype = getattr(torch, (file.metadata() or {})["dtype"])
        for _ in range(int(state["sequences"])):
            next(store.iterable_sequences)
        if "row" in state:
            store.current_row_idx = int(state["row"])
        with safe_open(checkpoint / ACTIVATIONS_STORE_STATE_FILENAME, "pt") as file:
            # SAELens counts the rows of all epochs. It must not search for the position again.
            store.n_dataset_processed = int(file.get_tensor("n_dataset_processed"))
        if "kept" in state:
            self._waiting, self._kept = state["waiting"].to(dtype), state["kept"].to(dtype)
        else:
            warnings.warn(
                f"{checkpoint} holds no activation buffer, which was too large: the run trains on "
                "other activations",
                stacklevel=2,
            )


def _packed(values: Tensor) -> Tensor:
    """Return the values as bfloat16 if that is exact, as for a model in bfloat16."""
    half = values.to(torch.bfloat16)
    return half if torch.equal(half.to(values.dtype), values) else values.contiguous()
