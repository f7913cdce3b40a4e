"""What a run on a language model needs of a GPU and of a disk, worked out from shapes.

Nothing here was measured. Sizes are in bytes. The share of its peak that a GPU reaches is assumed;
the rest is counted: `tests/test_budget.py` holds it against what PyTorch says of real steps.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from sae_lens import LanguageModelSAERunnerConfig, TrainingSAE
from sae_lens.constants import DTYPE_MAP

from sae_lens_atm.data.activation_stream import MOST_BYTES
from sae_lens_atm.sae.config import ATMTrainingSAEConfig

GIB = 2**30
# Operations a second of an A100 with 80 GiB, in dense products.
PEAK = {torch.bfloat16: 312e12, torch.float16: 312e12, torch.float32: 19.5e12}
SHARE = 0.3  # of the peak; the rest of a step is memory traffic

# Bytes that a training step holds for each entry of batch x d_sae, and of d_in x d_sae.
_STEP = {"atm": (52, 38)}
_STEP_OF_OTHERS = (27, 28)


class SAESize(NamedTuple):
    """Bytes of a SAE in training."""

    parameters: int
    state: int
    """Parameters, averages, counters: what `state_dict` holds."""
    d_sae: int

    @property
    def resident(self) -> int:
        """What stays on the GPU between steps: the state and the two moments of Adam."""
        return self.state + 2 * self.parameters

    @property
    def checkpoint(self) -> int:
        # Two float32 counters and the sparsity of each latent beside that.
        return self.resident + 12 * self.d_sae


class LanguageModel(NamedTuple):
    """What the cost of a forward pass depends on."""

    parameters: int
    dtype: torch.dtype
    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int
    flops: float
    """Of one token, from the embedding to the hook, where SAELens stops."""


def sae_size(cfg: Any) -> SAESize:
    """Of a SAE's config, without its memory."""
    sae = TrainingSAE[Any].from_dict({**cfg.to_dict(), "device": "meta"})
    parameters = sum(p.nbytes for p in sae.parameters())
    return SAESize(parameters, sum(t.nbytes for t in sae.state_dict().values()), cfg.d_sae)


def products(cfg: Any, batch: int) -> float:
    """Products of a batch x d_in and a d_in x d_sae matrix in a training step, averaged over the
    schedule, dense as on a GPU and with dead latents to revive all along."""
    count = 6.0  # encode, decode; of backward four, one of them for the bias of the decoder
    if hasattr(cfg, "aux_loss_coefficient"):
        count += 3  # decoding dead latents, and back
    if isinstance(cfg, ATMTrainingSAEConfig):
        count += 1  # the contribution
        if cfg.mask_rate > 0:
            count += 3 * cfg.mask_end  # decoding the masked view, and back
        if cfg.parent_weight > 0:
            rows = min(cfg.parent_rows, cfg.d_sae) / batch
            count += (1 + rows) * (1 - cfg.parent_start)
    return count


def step_bytes(cfg: Any, batch: int) -> int:
    """What a training step holds at its peak, gradients included."""
    per_activation, per_weight = _STEP.get(cfg.architecture(), _STEP_OF_OTHERS)
    return per_activation * batch * cfg.d_sae + per_weight * cfg.d_in * cfg.d_sae


def store_bytes(run: LanguageModelSAERunnerConfig[Any]) -> int:
    """What SAELens' activation store holds at its peak, in float32 whatever the dtypes are.

    While it refills its buffer the one before is still being served, and the new one is there
    twice: joined and shuffled. `n_batches_in_buffer` counts rows of the context, not LLM batches.
    """
    llm_batch = run.store_batch_size_prompts * run.context_size
    buffer = run.n_batches_in_buffer * run.context_size + llm_batch
    tokens = 3 * buffer + llm_batch + int(run.prefetch_llm_batches) * run.train_batch_size_tokens
    return 4 * run.sae.d_in * tokens


def forward_bytes(model: LanguageModel, prompts: int, context: int, dtype: torch.dtype) -> int:
    """What a forward pass up to the hook holds beside the weights, attention being eager."""
    scores = 3 * 4 * model.heads * context  # three times in float32
    streams = dtype.itemsize * (8 * model.hidden + 3 * model.intermediate)
    return prompts * context * (scores + streams)


def evaluation_bytes(model: LanguageModel, prompts: int, context: int) -> int:
    """What SAELens' evaluation holds: logits of the model, with the SAE and with the hook ablated,
    and what the third of these passes makes on the way (soft caps, their logarithms)."""
    return 6 * prompts * context * model.vocabulary * model.dtype.itemsize


def memory(run: LanguageModelSAERunnerConfig[Any], model: LanguageModel) -> dict[str, int]:
    """Bytes on the GPU by what needs them; evaluation comes when training is over."""
    size, batch = sae_size(run.sae), run.train_batch_size_tokens
    context, prompts = run.context_size, run.store_batch_size_prompts
    forward = forward_bytes(model, prompts, context, _llm_dtype(run, model))
    training = {
        "its batch": forward,
        "a step": step_bytes(run.sae, batch),
        "activation store": store_bytes(run),
    }
    evaluation = evaluation_bytes(model, run.eval_batch_size_prompts or prompts, context)
    beyond = max(evaluation + training["activation store"] - sum(training.values()), 0)
    weights = model.parameters * model.dtype.itemsize
    needed = {
        "LLM": weights,
        "SAE with Adam": size.resident,
        **training,
        "more in evaluation": beyond,
    }
    return {name: amount for name, amount in needed.items() if amount}


def seconds(run: LanguageModelSAERunnerConfig[Any], model: LanguageModel) -> dict[str, float]:
    """Seconds by what takes them. On one GPU they add up: prefetching overlaps the language model
    with the host's work, not with the SAE's."""
    tokens = run.training_tokens
    if run.sae.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        estimated = run.n_batches_for_norm_estimate * run.train_batch_size_tokens
    else:
        estimated = 0
    a_token = products(run.sae, run.train_batch_size_tokens) * 2 * run.sae.d_in * run.sae.d_sae
    dtype = torch.bfloat16 if run.autocast else DTYPE_MAP[run.sae.dtype]
    return {
        "LLM": (tokens + estimated) * model.flops / _rate(_llm_dtype(run, model)),
        "SAE": tokens * a_token / _rate(dtype),
    }


def stream_bytes(run: LanguageModelSAERunnerConfig[Any]) -> int:
    """What a checkpoint holds of the activations that wait, at most: the buffer and what was made
    ahead, in half the space if the model is in bfloat16."""
    rows = run.n_batches_in_buffer + run.store_batch_size_prompts
    tokens = rows * run.context_size + int(run.prefetch_llm_batches) * run.train_batch_size_tokens
    dtype = (run.model_from_pretrained_kwargs or {}).get("dtype")
    needed = (2 if dtype == "bfloat16" else 4) * run.sae.d_in * tokens
    return needed if needed <= MOST_BYTES else 0


def disk(run: LanguageModelSAERunnerConfig[Any]) -> int:
    """Bytes of all checkpoints, one of an interruption among them, and of the finished SAE."""
    size = sae_size(run.sae)
    checkpoints = run.n_checkpoints + run.save_final_checkpoint + 1
    each = size.checkpoint + stream_bytes(run)
    return checkpoints * each + size.parameters + 4 * size.d_sae


def describe(parts: Mapping[str, float], unit: float, name: str) -> str:
    """A sum and its parts, largest first: `3.0 GiB (LLM 2.0, SAE 1.0)`."""
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{what} {amount / unit:.1f}" for what, amount in ordered)
    return f"{sum(parts.values()) / unit:.1f} {name} ({listed})"


def _llm_dtype(run: LanguageModelSAERunnerConfig[Any], model: LanguageModel) -> torch.dtype:
    return torch.bfloat16 if run.autocast_lm else model.dtype


def _rate(dtype: torch.dtype) -> float:
    return SHARE * PEAK.get(dtype, PEAK[torch.float32])
