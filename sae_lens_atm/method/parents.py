"""Which latents imply which, and a pressure that keeps a child's decoder off its parents'.

This part is ours, not the paper's. A mask makes parents work beside a silent child; it does nothing
against the child that carries its parent along, and the reward for that (one active latent instead
of two) remains. Here the child pays for what it carries.

Latent ``j`` *implies* a more important latent ``i`` if the inputs on which ``j`` fires hold as much
of ``i``'s direction as those on which ``i`` fires. That is read off the inputs and not off the
activations, so it holds whether the parent's latent fires beside the child or was absorbed by it,
and two features that merely overlap in a crowded space do not pass for parent and child.
"""

import torch
from torch import Tensor

from sae_lens_atm.method.importance import ExactBuffers
from sae_lens_atm.method.sparse import Pattern, dots_at, sparse_products_are_fast

_TINY = 1e-12


def lift(inputs: Tensor, magnitude: Tensor, mean_input: Tensor, decoder: Tensor) -> Tensor:
    """``L_ji = <E[a_j x] / E[a_j] - E[x], d_i / |d_i|>``: how much more of ``i``'s direction an
    input holds when latent ``j`` fires (weighted by how strongly) than it does on average.

    Args:
        inputs: ``E[a_j x]`` of some latents, shape ``(latents, d_in)``.
        magnitude: ``E[a_j]`` of them, shape ``(latents,)``.
        mean_input: ``E[x]``, shape ``(d_in,)``.
        decoder: rows ``d_i`` of any length, shape ``(d_sae, d_in)``.
    """
    typical = inputs / magnitude.clamp(min=_TINY).unsqueeze(1)
    length = decoder.norm(dim=-1).clamp(min=_TINY)
    return ((typical - mean_input).to(decoder.dtype) @ decoder.T / length).to(inputs.dtype)


def implied_parents(
    lift: Tensor, own_lift: Tensor, importance: Tensor, rows: Tensor, tau: float, most: int
) -> Tensor:
    """The latents ``i`` that each latent ``rows[j]`` implies, shape ``(rows, most)``, -1 where
    there are fewer:

        L_ji >= tau L_ii   and   Importance_i > Importance_j

    Measured by its own lift ``L_ii``, a latent that often fires weakly, with whatever is near, is
    not taken for a parent of all that overlaps with it. Latents without a lift of their own, as
    those that never fired, imply nothing and are implied by nothing. Of more than ``most`` the most
    clearly implied are told.
    """
    lifts = own_lift > 0
    implied = lift >= tau * own_lift
    implied &= (importance > importance[rows, None]) & lifts & lifts[rows, None]
    clearness = (lift / own_lift.clamp(min=_TINY)).where(implied, -torch.inf)
    best = clearness.topk(min(most, clearness.shape[1]), dim=1)
    return best.indices.where(best.values > -torch.inf, -1)


def carried_energy(decoder: Tensor, parents: Tensor, energy: Tensor) -> Tensor:
    """``sum_j E[a_j^2] sum_i max(cos(d_j, d_i), 0)^2`` over the parents ``i`` that ``j`` implies:
    the energy that children add along their parents' directions, in units of the squared error.

    Its gradient reaches the children's rows alone.

    Args:
        decoder: rows ``d_j`` of any length, shape ``(d_sae, d_in)``.
        parents: of `implied_parents`, for all latents, shape ``(d_sae, most)``.
        energy: ``E[(a_j |d_j|)^2]``, shape ``(d_sae,)``.
    """
    length = decoder.norm(dim=-1).clamp(min=_TINY)
    energy = energy.to(decoder.dtype)
    if not sparse_products_are_fast(decoder):
        return _carried_densely(decoder / length.unsqueeze(1), parents, energy)
    child, place = (parents >= 0).nonzero(as_tuple=True)
    parent = parents[child, place]
    pattern = Pattern(child, parent, (len(decoder), len(decoder)))
    dots = dots_at(decoder, decoder.detach(), pattern)
    cosine = dots / (length[child] * length.detach()[parent])
    return cosine.clamp(min=0).square() @ energy[child]


def _carried_densely(unit: Tensor, parents: Tensor, energy: Tensor) -> Tensor:
    """The same of unit rows, without sparse products. Its gradient, ``2 E[a_j^2] sum_i cos u_i``,
    is summed up on the way, so that the backward pass needs no row of a parent."""
    with torch.no_grad():
        carried, gradient = unit.new_zeros(()), torch.zeros_like(unit)
        for parent in parents.T:
            rows = unit[parent]
            cosine = (unit * rows).sum(-1).clamp(min=0) * (parent >= 0)
            carried = carried + cosine.square() @ energy
            gradient += (2 * energy * cosine).unsqueeze(1) * rows
    linear = (unit * gradient).sum()
    return carried + (linear - linear.detach())


class ParentTracker(ExactBuffers):
    """Moving averages of the inputs on which each latent fires, in float32, and the parents that
    each implies by them.

    Only ratios of the averages are used, which need no bias correction. A latent that a step did
    not see keeps its own.
    """

    inputs: Tensor
    """``E[a_j |d_j| x]``, shape ``(d_sae, d_in)``."""
    magnitude: Tensor
    """``E[a_j |d_j|]``, shape ``(d_sae,)``."""
    mean_input: Tensor
    """``E[x]``, shape ``(d_in,)``."""
    weight: Tensor
    """How much of `mean_input` has been filled."""
    own_lift: Tensor
    """``L_ii`` of `lift`, as it was when the latent's parents were last looked for, shape
    ``(d_sae,)``; 0 before that."""
    parents: Tensor
    """Of `implied_parents`, as they were last looked for, shape ``(d_sae, most)``."""
    exact_buffers = ("inputs", "magnitude", "mean_input", "weight", "own_lift", "parents")

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        decay: float = 0.99,
        device: torch.device | str | None = None,
        most: int = 8,
    ) -> None:
        super().__init__()
        self.decay = decay
        latents = {"magnitude": (d_sae,), "own_lift": (d_sae,)}
        shapes = {"inputs": (d_sae, d_in), "mean_input": (d_in,), "weight": (), **latents}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=device))
        self.register_buffer("parents", torch.full((d_sae, most), -1, device=device))

    @torch.no_grad()
    def update(
        self, inputs: Tensor, magnitude: Tensor, mean_input: Tensor, exposure: Tensor
    ) -> None:
        """Take in one batch.

        Args:
            inputs: means of ``a_j |d_j| x`` over the whole batch, a masked latent counted as
                silent, shape ``(d_sae, d_in)``.
            magnitude: means of ``a_j |d_j|``, likewise, shape ``(d_sae,)``.
            mean_input: mean of ``x``, shape ``(d_in,)``.
            exposure: share of the batch in which each latent was kept; 0 leaves its averages
                alone, and so does a batch that is not finite.
        """
        share = exposure.float().clamp(min=_TINY)
        inputs, magnitude = inputs.float() / share.unsqueeze(1), magnitude.float() / share
        # Of a row that is not finite neither is its sum.
        seen = (exposure > 0) & inputs.sum(1).isfinite() & magnitude.isfinite()
        finite = mean_input.isfinite().all() & seen.any()
        one = torch.ones_like(self.weight)
        for old, new, where in (
            (self.inputs, inputs, seen.unsqueeze(1)),
            (self.magnitude, magnitude, seen),
            (self.mean_input, mean_input.float(), finite),
            (self.weight, one, finite),
        ):
            old.lerp_(new.where(where, old), 1 - self.decay)

    @torch.no_grad()
    def look_for_parents(
        self, rows: Tensor, decoder: Tensor, importance: Tensor, tau: float
    ) -> None:
        """Look for the parents of some latents again."""
        mean_input = self.mean_input / self.weight.clamp(min=_TINY)
        found = lift(self.inputs[rows], self.magnitude[rows], mean_input, decoder)
        own = found.gather(1, rows[:, None]).squeeze(1)
        self.own_lift[rows] = own.where(self.magnitude[rows] > _TINY, 0.0)
        most = self.parents.shape[1]
        implied = implied_parents(found, self.own_lift, importance, rows, tau, most)
        self.parents[rows, : implied.shape[1]] = implied
