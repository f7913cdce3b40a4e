"""Tree SAE: a latent may fire only where its parent fires.

Cao, Nhat, Alharbi, Nguyen, Thai: *Tree SAE: Learning Hierarchical Feature Structures in Sparse
Autoencoders*, arXiv:2605.07922, with details from the authors' code (github.com/tue147/tree-sae).
The latents form layers l = 1 to L, of s_l latents. A latent i above the first layer has one parent
a(i): a latent of any lower layer, or a root that always fires.

    z_l = ReLU(TopK_{k_l}((W_enc (x - b_dec) + b_enc)_l * 1[z_{a(i)} > 0]))            (6)
    L_tree = sum_l |x - (b_dec + sum_{t <= l} W_dec,t z_t)|^2 + alpha_1 L_aux,1        (7 to 9)

L_aux,1: dead latents of the first layer reconstruct its error, and L_aux,1 is relative to the
variance of that error. The paper divides the other terms by Var(x). Here L_aux,1 is multiplied by
Var(x) instead, for the scale of SAELens' losses. alpha_1 is 1/32.

Parents are drawn at random and then reallocated. Each step divides the loss by the number of
possible parents that fired, the root included, and adds it to the capacity C_p of each of them. A
reallocation shares the s_l latents of a layer among the living possible parents p, k_p each, so
that the smallest C_p / k_p is as large as possible (algorithm 1). Dead children of parents with
more than k_p then move to parents with fewer (algorithm 2). The paper reallocates after 3,000
steps, then after twice the interval, at most 10,000 steps. After 50,000 steps, half of its run, it
moves all dead children to the root, and stops. Here these are shares .03, .1 and .5 of
`schedule_steps`.

Not in the parts of the paper and code that we have, and chosen here:

- k_l: an even split of k.
- s_l for few active latents: with k of 4 or more, d_sae times 1/16, 2/16, 6/16 and 7/16, as in the
  paper's largest tree; with less, 1/4 and 3/4.
- Dead is what the trainer counts as dead (`dead_feature_window`).
- The paper standardises each input. Here one factor may scale them,
  `normalize_activations: expected_average_only_in`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from sae_lens import (
    SAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import calculate_topk_aux_acts
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.baselines.shared import CountsSteps, require, require_one_scale
from sae_lens_atm.baselines.tree_allocation import (
    reallocated,
    reallocation_end,
    reallocation_steps,
)
from sae_lens_atm.method.buffers import ExactBuffers

_PARTS, _FEW_PARTS = (1, 2, 6, 7), (1, 3)
_AUXILIARY_LATENTS = 256  # at most, in L_aux


@dataclass
class TreeSAEConfig(StandardSAEConfig):
    """Configuration of a saved Tree SAE. The fields are those of `TreeTrainingSAEConfig`."""

    k: int = 32
    tree_widths: list[int] = field(default_factory=list)
    tree_k: list[int] = field(default_factory=list)

    @override
    @classmethod
    def architecture(cls) -> str:
        return "tree_sae"


@dataclass
class TreeTrainingSAEConfig(TopKTrainingSAEConfig):
    """Configuration of a Tree SAE.

    Args:
        k: active latents of a sample, at most. Fewer fire where few parents have children.
        tree_widths: s_l, the number of latents of each layer; by default shares of `d_sae`.
        tree_k: k_l, the active latents of each layer; by default an even split of k.
        schedule_steps: number of training steps. Run files set it.
    """

    smallest_k: ClassVar[int] = 2
    """Smallest k: one active latent for each of two layers."""
    k: int = 32
    aux_loss_coefficient: float = 1 / 32
    tree_widths: list[int] = field(default_factory=list)
    tree_k: list[int] = field(default_factory=list)
    schedule_steps: int = 100_000

    @override
    @classmethod
    def architecture(cls) -> str:
        return "tree_sae"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TreeSAEConfig

    @override
    def __post_init__(self) -> None:
        require(self, "k", self.k >= self.smallest_k, "2 or more: a tree has at least two layers")
        widths, active = layer_widths(self), layer_k(self)
        exact = sum(widths) == self.d_sae and min(widths) > 0 and len(widths) > 1
        if not exact:
            raise ValueError(
                f"tree_widths must be two or more widths above 0, in total d_sae = {self.d_sae}, "
                f"got {widths}{'' if self.tree_widths else ' by default'}"
            )
        fits = len(active) == len(widths) and sum(active) == self.k and min(active) >= 0
        fits = fits and all(k <= width for k, width in zip(active, widths, strict=True))
        if not fits:
            raise ValueError(
                f"tree_k must be numbers from 0 to the widths {widths}, in total k = {self.k}, got "
                f"{active}{'' if self.tree_k else ' by default: set tree_k, tree_widths or k'}"
            )
        require(self, "schedule_steps", self.schedule_steps >= 0, "0 or more")
        require(self, "rescale_acts_by_decoder_norm", self.rescale_acts_by_decoder_norm, "true")
        require(self, "use_sparse_activations", not self.use_sparse_activations, "false")
        exact_types = ("float32", "float64")  # others round the indices of parents
        require(self, "dtype", self.dtype in exact_types, "one of float32, float64")
        require_one_scale(self)
        super().__post_init__()


def layer_widths(cfg: TreeSAEConfig | TreeTrainingSAEConfig) -> list[int]:
    """Return s_l, the number of latents of each layer."""
    if cfg.tree_widths:
        return cfg.tree_widths
    parts = _PARTS if cfg.k >= len(_PARTS) else _FEW_PARTS
    ends = [round(cfg.d_sae * end / sum(parts)) for end in accumulate(parts)]
    return [end - start for start, end in pairwise([0, *ends])]


def layer_k(cfg: TreeSAEConfig | TreeTrainingSAEConfig) -> list[int]:
    """Return k_l, the active latents of each layer."""
    count = len(layer_widths(cfg))
    return cfg.tree_k or [cfg.k // count + (layer < cfg.k % count) for layer in range(count)]


def tree_activations(
    pre: Tensor, parents: Tensor, widths: Sequence[int], active: Sequence[int]
) -> Tensor:
    """Return the activations of a tree.

    Args:
        pre: pre-activations, ``(..., d_sae)``.
        parents: the parent of each latent, ``(d_sae,)``; ``d_sae`` is the root.
        widths: the number of latents of each layer.
        active: the active latents of each layer, at most.
    """
    layers: list[Tensor] = []
    fires = torch.ones_like(pre[..., :1], dtype=torch.bool)  # the root, then latents before it
    start = 0
    for width, k in zip(widths, active, strict=True):
        layer = pre[..., start : start + width].relu()
        if start:  # latents of the first layer are children of the root
            parent = parents[start : start + width].clamp(max=start)
            layer = layer * fires[..., parent]
        values, indices = layer.topk(k, dim=-1, sorted=False)
        layers.append(torch.zeros_like(layer).scatter(-1, indices, values))
        fires = torch.cat([fires[..., :-1], layers[-1] > 0, fires[..., -1:]], dim=-1)
        start += width
    return torch.cat(layers, dim=-1)


class TreeSAE(ExactBuffers, StandardSAE):
    """A saved Tree SAE."""

    cfg: TreeSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    parents: Tensor
    """The parent of each latent, ``(d_sae,)``; ``d_sae`` is the root."""
    exact_buffers = ("parents",)

    def __init__(self, cfg: TreeSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        parents = torch.full((cfg.d_sae,), cfg.d_sae, dtype=torch.int64, device=cfg.device)
        self.register_buffer("parents", parents)

    @override
    def encode(self, x: Tensor) -> Tensor:
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        acts = tree_activations(pre, self.parents, layer_widths(self.cfg), layer_k(self.cfg))
        return self.hook_sae_acts_post(acts)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        if state_dict["parents"].dtype in (torch.float16, torch.bfloat16):
            raise ValueError("dtype must be float32 or float64: less rounds the tree of a Tree SAE")
        super().process_state_dict_for_loading(state_dict)


class TreeTrainingSAE(CountsSteps, TopKTrainingSAE):
    """A Tree SAE in training."""

    cfg: TreeTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    parents: Tensor
    capacity: Tensor
    """C_p of the possible parents (columns) of each layer (rows) since the last reallocation."""
    exact_buffers = ("steps", "parents", "capacity")

    def __init__(self, cfg: TreeTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.widths, self.active = layer_widths(cfg), layer_k(cfg)
        parents = torch.full((cfg.d_sae,), cfg.d_sae, dtype=torch.int64, device=cfg.device)
        for start, end in self.upper_layers():
            drawn = torch.randint(start + 1, (end - start,), device=cfg.device)
            parents[start:end] = torch.where(drawn == start, cfg.d_sae, drawn)
        self.register_buffer("parents", parents)
        capacity = torch.zeros(len(self.widths), cfg.d_sae + 1, device=cfg.device)
        self.register_buffer("capacity", capacity)
        self.end = reallocation_end(cfg.schedule_steps)
        self.reallocations = reallocation_steps(cfg.schedule_steps)

    def upper_layers(self) -> Iterator[tuple[int, int]]:
        """Yield the first latent and the end of each layer above the first."""
        yield from pairwise(accumulate(self.widths))

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        pre = pre * self.W_dec.norm(dim=-1)
        acts = tree_activations(pre, self.parents, self.widths, self.active)
        return self.hook_sae_acts_post(acts), pre

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = super().training_forward_pass(step_input)
        for end, sae_out in self.lower_reconstructions(output.feature_acts):
            error = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
            output.losses[f"inner_mse_loss_{end}"] = error
            output.loss = output.loss + error
        self.update_parents(output, step_input.dead_neuron_mask)
        return output

    def lower_reconstructions(self, acts: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the end of each layer but the last, and the reconstruction up to it."""
        rows = self.W_dec / self.W_dec.norm(dim=-1, keepdim=True)
        decoded = self.b_dec
        for start, end in pairwise(accumulate(self.widths[:-1], initial=0)):
            decoded = decoded + acts[..., start:end] @ rows[start:end]
            yield end, self.run_time_activation_norm_fn_out(decoded)

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        """Return ``alpha_1 L_aux,1``, in SAELens' scale."""
        loss, width, x = sae_out.new_zeros(()), self.widths[0], step_input.sae_in
        dead = step_input.dead_neuron_mask
        count = 0 if dead is None else min(int(dead[:width].sum()), _AUXILIARY_LATENTS)
        if dead is not None and count:
            _, first = next(self.lower_reconstructions(feature_acts))
            error = (x - first).detach()
            chosen = calculate_topk_aux_acts(count, hidden_pre[..., :width], dead[:width]).relu()
            rows = self.W_dec[:width]
            found = chosen @ (rows / rows.norm(dim=-1, keepdim=True))
            spread = (error - error.mean(-1, keepdim=True)).square().mean().clamp(min=1e-12)
            relative = (error - found).square().mean() / spread
            loss = self.cfg.aux_loss_coefficient * x.shape[-1] * x.var() * relative
        return {"auxiliary_reconstruction_loss": loss}

    @torch.no_grad()
    def update_parents(self, output: TrainStepOutput, dead: Tensor | None) -> None:
        """Add the loss to the capacities, and reallocate dead children when it is time."""
        step = int(self.steps)
        if step > self.end:
            return
        fired = (output.feature_acts.flatten(0, -2) > 0).any(0).to(self.capacity.dtype)
        for row, (start, _) in enumerate(self.upper_layers()):
            share = output.loss.to(self.capacity.dtype) / (fired[:start].sum() + 1)
            self.capacity[row, :start] += share * fired[:start]
            self.capacity[row, -1] += share
        if step != self.end and step not in self.reallocations:
            return
        dead = torch.zeros_like(self.parents, dtype=torch.bool) if dead is None else dead
        for row, (start, end) in enumerate(self.upper_layers()):
            if step == self.end:
                self.parents[start:end][dead[start:end]] = self.cfg.d_sae
            else:
                # In these the root follows the latents before the layer.
                parents = self.parents[start:end].clamp(max=start)
                capacity = torch.cat([self.capacity[row, :start], self.capacity[row, -1:]])
                living = torch.cat([~dead[:start], dead.new_ones(1)])
                parents = reallocated(parents, dead[start:end], capacity, living)
                self.parents[start:end] = torch.where(parents == start, self.cfg.d_sae, parents)
        self.capacity.zero_()

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict.pop("capacity")


register_sae_class("tree_sae", TreeSAE, TreeSAEConfig)
register_sae_training_class("tree_sae", TreeTrainingSAE, TreeTrainingSAEConfig)
