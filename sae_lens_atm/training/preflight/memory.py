"""Memory and disk space that a run needs, computed from its settings.

All sizes are in bytes. `tests/training/preflight/test_memory.py` compares them with real steps.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from sae_lens import LanguageModelSAERunnerConfig, TrainingSAE

from sae_lens_atm.data.activation_stream import MOST_BYTES
from sae_lens_atm.evaluation.next_token_loss import LOGITS, TOKENS
from sae_lens_atm.sae.config import ATMTrainingSAEConfig
from sae_lens_atm.training.latent_history import POINTS
from sae_lens_atm.training.preflight.model_facts import ModelShape

GIB = 2**30
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

# Peak of a training step, in bytes for each entry of (batch, d_sae) and of (d_in, d_sae).
_STEP = {"atm": (52, 38)}
_STEP_OF_OTHERS = (27, 28)


class SAESize(NamedTuple):
    """Sizes of an SAE in training."""

    parameters: int
    state: int
    """Parameters, averages and counters: everything in `state_dict`."""
    d_sae: int

    @property
    def resident(self) -> int:
        """What stays on the device between steps.

        State, the two moments of Adam, SAELens' two counters of each latent, and the copies of
        these counters with which a bad batch is undone.
        """
        return self.state + 2 * self.parameters + 16 * self.d_sae

    @property
    def checkpoint(self) -> int:
        """Size of a checkpoint: state, moments, two counters and the sparsity of each latent."""
        return self.state + 2 * self.parameters + 12 * self.d_sae


def sae_size(cfg: Any) -> SAESize:
    """Return the sizes of an SAE, from its training config. No memory is allocated."""
    sae = TrainingSAE[Any].from_dict({**cfg.to_dict(), "device": "meta"})
    parameters = sum(p.nbytes for p in sae.parameters())
    return SAESize(parameters, sum(t.nbytes for t in sae.state_dict().values()), cfg.d_sae)


def step_bytes(cfg: Any, batch: int) -> int:
    """Return what a training step allocates at its peak, gradients included."""
    per_activation, per_weight = _STEP.get(cfg.architecture(), _STEP_OF_OTHERS)
    return per_activation * batch * cfg.d_sae + per_weight * cfg.d_in * cfg.d_sae


def store_bytes(run: LanguageModelSAERunnerConfig[Any]) -> int:
    """Return what SAELens' activation store holds at its peak, in float32 for any dtype.

    While the store refills its buffer, it still serves the previous one, and holds the new one
    twice: joined and shuffled. `n_batches_in_buffer` counts rows of the context, not LLM batches.
    """
    llm_batch = run.store_batch_size_prompts * run.context_size
    buffer = run.n_batches_in_buffer * run.context_size + llm_batch
    tokens = 3 * buffer + llm_batch + int(run.prefetch_llm_batches) * run.train_batch_size_tokens
    return 4 * run.sae.d_in * tokens


def forward_bytes(model: ModelShape, prompts: int, context: int, dtype: torch.dtype) -> int:
    """Return what a forward pass to the hook allocates, with eager attention."""
    scores = 3 * 4 * model.heads * context  # three times in float32
    streams = dtype.itemsize * (8 * model.hidden + 3 * model.intermediate)
    return prompts * context * (scores + streams)


def evaluation_bytes(run: LanguageModelSAERunnerConfig[Any], model: ModelShape) -> int:
    """Return what the evaluation allocates, after training or for wandb.

    After training, it holds `LOGITS` logits a few times, and all latents of `TOKENS` tokens.
    SAELens' evaluation for wandb holds three sets of the logits of a batch: of the model, with the
    SAE, and with the hook set to zero. Its third forward pass needs as much again.
    """
    if run.logger.log_to_wandb:
        prompts = run.eval_batch_size_prompts or run.store_batch_size_prompts
        return 6 * prompts * run.context_size * model.vocabulary * model.dtype.itemsize
    logits = max(LOGITS, model.vocabulary)
    return 4 * 5 * (logits + max(TOKENS, run.context_size) * run.sae.d_sae)


def memory(run: LanguageModelSAERunnerConfig[Any], model: ModelShape) -> dict[str, int]:
    """Return the memory on the device by purpose. No step is taken during an evaluation."""
    size, batch = sae_size(run.sae), run.train_batch_size_tokens
    context, prompts = run.context_size, run.store_batch_size_prompts
    forward = forward_bytes(model, prompts, context, _llm_dtype(run, model))
    training = {
        "its batch": forward,
        "a step": step_bytes(run.sae, batch),
        "activation store": store_bytes(run),
    }
    # The store keeps its activations in an evaluation.
    beyond = max(evaluation_bytes(run, model) - training["a step"] - forward, 0)
    needed = {
        "LLM": model.parameters * model.dtype.itemsize,
        "SAE with Adam": size.resident,
        **training,
        "more in evaluation": beyond,
    }
    return {name: amount for name, amount in needed.items() if amount}


def available_bytes(device: str | None) -> int | None:
    """Return the free memory of a device, or None if it is unknown."""
    kind = torch.device(device or "cpu").type
    if kind == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if kind != "cpu":
        return None
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # not on this system
        return None


def total_bytes(device: str) -> int | None:
    """Return the memory of a device, or None if it is unknown."""
    kind = torch.device(device).type
    if kind == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.device(device)).total_memory
    if kind != "cpu":
        return None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # not on this system
        return None


def synthetic_bytes(features: int, d_in: int, batch: int) -> int:
    """Return what a synthetic model takes, with the features of a batch and masks of them."""
    return 4 * features * d_in + 16 * batch * features


def stream_bytes(run: LanguageModelSAERunnerConfig[Any]) -> int:
    """Return the largest size of the activations in a checkpoint: buffer and prefetched batches.

    Activations of a model in bfloat16 take half the space.
    """
    rows = run.n_batches_in_buffer + run.store_batch_size_prompts
    tokens = rows * run.context_size + int(run.prefetch_llm_batches) * run.train_batch_size_tokens
    dtype = (run.model_from_pretrained_kwargs or {}).get("dtype")
    needed = (2 if dtype == "bfloat16" else 4) * run.sae.d_in * tokens
    return needed if needed <= MOST_BYTES else 0


def disk(run: LanguageModelSAERunnerConfig[Any]) -> int:
    """Return the space of all checkpoints, with one for an interruption, and the finished SAE."""
    size = sae_size(run.sae)
    checkpoints = run.n_checkpoints + run.save_final_checkpoint + 1
    each = size.checkpoint + stream_bytes(run)
    # Checkpoints at even distances hold half of the latents' history on average.
    histories = run.n_checkpoints / 2 + run.save_final_checkpoint + 2
    history = round(histories * latent_history_bytes(run))
    return checkpoints * each + size.parameters + 4 * size.d_sae + history


def latent_history_bytes(run: LanguageModelSAERunnerConfig[Any]) -> int:
    """Return the size of `latents.safetensors` of a run: float32 and float16 for each latent."""
    if run.sae.architecture() != ATMTrainingSAEConfig.architecture():
        return 0
    return 6 * run.sae.d_sae * min(POINTS, run.total_training_steps)


def size_text(amount: float) -> str:
    """Return a size as text, in the largest unit of which there is at least one."""
    unit = _UNITS[0]
    for unit in _UNITS:
        if amount < 1024 or unit == _UNITS[-1]:
            break
        amount /= 1024
    return f"{amount:,.0f} B" if unit == "B" else f"{amount:,.1f} {unit}"


def describe(parts: Mapping[str, float]) -> str:
    """Return a sum and its parts as text, the largest first: `3.0 GiB (LLM 2.0, SAE 1.0)`."""
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    total = sum(parts.values())
    name = size_text(total).split()[1]
    unit = 1024 ** _UNITS.index(name)
    listed = ", ".join(f"{what} {amount / unit:.1f}" for what, amount in ordered)
    return f"{size_text(total)} ({listed})"


def _llm_dtype(run: LanguageModelSAERunnerConfig[Any], model: ModelShape) -> torch.dtype:
    return torch.bfloat16 if run.autocast_lm else model.dtype
