"""Pressure on children: a loss that keeps a parent's direction out of a child's decoder row.

This part is ours, not the paper's. Without it absorption is rewarded: one active latent, the child,
can replace two, the parent and the child.

Latent ``j`` *implies* a more important latent ``i`` if the inputs on which ``j`` fires contain
``i``'s direction about as much as the inputs on which ``i`` fires. Then ``i`` is a parent of ``j``.
The test uses inputs and not activations. It therefore also finds a parent that was absorbed and
does not fire beside its child. Two features whose directions merely overlap do not pass it.
"""

import torch
from torch import Tensor

from sae_lens_atm.method.buffers import ExactBuffers
from sae_lens_atm.method.sparse import Pattern, dots_at, sparse_products_are_fast

_TINY = 1e-12


def lift(inputs: Tensor, magnitude: Tensor, mean_input: Tensor, decoder: Tensor) -> Tensor:
    """Return ``L_ji = <E[a_j x] / E[a_j] - E[x], d_i / |d_i|>``, shape ``(latents, d_sae)``.

    It compares the length along ``d_i`` of inputs on which latent ``j`` fires with the average
    input. Inputs are weighted by the activation of ``j``.

    Args:
        inputs: ``E[a_j x]`` of some latents, shape ``(latents, d_in)``.
        magnitude: ``E[a_j]`` of the same latents, shape ``(latents,)``.
        mean_input: ``E[x]``, shape ``(d_in,)``.
        decoder: rows ``d_i`` of any length, shape ``(d_sae, d_in)``.
    """
    typical = inputs / magnitude.clamp(min=_TINY).unsqueeze(1)
    length = decoder.norm(dim=-1).clamp(min=_TINY)
    return ((typical - mean_input).to(decoder.dtype) @ decoder.T / length).to(inputs.dtype)


def implied_parents(
    lift: Tensor,
    own_lift: Tensor,
    importance: Tensor,
    rows: Tensor,
    tau: float,
    chance: float,
    most: int,
) -> Tensor:
    """Return the parents ``i`` of each latent ``rows[j]``, shape ``(rows, most)``, padded with -1::

        L_ji >= tau L_ii   and   L_ji >= chance sigma_j   and   Importance_i > Importance_j

    ``sigma_j`` is the root mean square of the ``L_jk`` that fail the first condition, and of those
    of latents ``k`` without a lift of their own. These are lifts along directions that the inputs
    of ``j`` contain by chance only. The second condition excludes latents that mix several
    features. Such latents overlap with many others, and are frequent above the true L0.

    Comparing with the parent's own lift ``L_ii`` excludes latents that often fire weakly. They
    would otherwise count as parents of every latent that overlaps with them. Latents without a
    positive lift, for example those that never fired, have no parents and no children. If there are
    more than ``most`` parents, those with the largest ``L_ji / L_ii`` are returned.
    """
    lifts = own_lift > 0
    implied = (lift >= tau * own_lift) & lifts
    others = lift.shape[1] - implied.sum(1, keepdim=True)
    length = lift.masked_fill(implied, 0.0).norm(dim=1, keepdim=True)
    by_chance = length / others.clamp(min=1).sqrt()
    implied &= (lift >= chance * by_chance) & (importance > importance[rows, None])
    implied &= lifts[rows, None]
    clearness = (lift / own_lift.clamp(min=_TINY)).where(implied, -torch.inf)
    best = clearness.topk(min(most, clearness.shape[1]), dim=1)
    return best.indices.where(best.values > -torch.inf, -1)


def carried_energy(decoder: Tensor, parents: Tensor, energy: Tensor) -> Tensor:
    """Return ``sum_j E[a_j^2] sum_i max(cos(d_j, d_i), 0)^2`` over the parents ``i`` of ``j``.

    It is the energy that children add along their parents' directions, in units of the squared
    error. Only the children's rows get a gradient.

    Args:
        decoder: rows ``d_j`` of any length, shape ``(d_sae, d_in)``.
        parents: result of `implied_parents` for all latents, shape ``(d_sae, most)``.
        energy: ``E[(a_j |d_j|)^2]``, shape ``(d_sae,)``.
    """
    length = decoder.norm(dim=-1).clamp(min=_TINY)
    energy = energy.to(decoder.dtype)
    if not sparse_products_are_fast(decoder):
        return _dense_carried_energy(decoder / length.unsqueeze(1), parents, energy)
    child, place = (parents >= 0).nonzero(as_tuple=True)
    parent = parents[child, place]
    pattern = Pattern(child, parent, (len(decoder), len(decoder)))
    dots = dots_at(decoder, decoder.detach(), pattern)
    cosine = dots / (length[child] * length.detach()[parent])
    return cosine.clamp(min=0).square() @ energy[child]


def _dense_carried_energy(unit: Tensor, parents: Tensor, energy: Tensor) -> Tensor:
    """Return `carried_energy` of unit rows, without sparse products.

    The gradient ``2 E[a_j^2] sum_i cos u_i`` is summed in the forward pass, so that the backward
    pass does not need the parents' rows.
    """
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
    """Moving averages of the inputs on which each latent fires, and the parents found with them.

    The averages are float32. Only their ratios are used, which need no bias correction. A masked
    latent keeps its averages.
    """

    inputs: Tensor
    """``E[a_j |d_j| x]``, shape ``(d_sae, d_in)``."""
    magnitude: Tensor
    """``E[a_j |d_j|]``, shape ``(d_sae,)``."""
    mean_input: Tensor
    """``E[x]``, shape ``(d_in,)``."""
    weight: Tensor
    """Sum of the weights of all updates of `mean_input`."""
    own_lift: Tensor
    """``L_ii`` of `lift` at the last search for the latent's parents, shape ``(d_sae,)``."""
    parents: Tensor
    """Result of `implied_parents` at the last search, shape ``(d_sae, most)``."""
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
        self, inputs: Tensor, magnitude: Tensor, mean_input: Tensor, measured: Tensor
    ) -> None:
        """Update the averages with one batch.

        Args:
            inputs: means of ``a_j |d_j| x``, shape ``(d_sae, d_in)``.
            magnitude: means of ``a_j |d_j|``, shape ``(d_sae,)``.
            mean_input: mean of ``x``, shape ``(d_in,)``.
            measured: true for the latents to update, shape ``(d_sae,)``. Latents whose means are
                not finite are not updated either.
        """
        inputs, magnitude = inputs.float(), magnitude.float()
        # If a row is not finite, its sum is not finite either.
        where = measured & inputs.sum(1).isfinite() & magnitude.isfinite()
        finite = mean_input.isfinite().all() & where.any()
        one = torch.ones_like(self.weight)
        for old, new, updated in (
            (self.inputs, inputs, where.unsqueeze(1)),
            (self.magnitude, magnitude, where),
            (self.mean_input, mean_input.float(), finite),
            (self.weight, one, finite),
        ):
            old.lerp_(new.where(updated, old), 1 - self.decay)

    @torch.no_grad()
    def update_parents(
        self, rows: Tensor, decoder: Tensor, importance: Tensor, tau: float, chance: float
    ) -> None:
        """Search again for the parents of the latents ``rows``.

        The search depends on the averages, decoder and importance at the start of a step only. A
        step that is rejected and repeated therefore finds the same parents.
        """
        mean_input = self.mean_input / self.weight.clamp(min=_TINY)
        lifts = lift(self.inputs[rows], self.magnitude[rows], mean_input, decoder)
        own = lifts.gather(1, rows[:, None]).squeeze(1)
        self.own_lift[rows] = own.where(self.magnitude[rows] > _TINY, 0.0)
        most = self.parents.shape[1]
        implied = implied_parents(lifts, self.own_lift, importance, rows, tau, chance, most)
        self.parents[rows, : implied.shape[1]] = implied
