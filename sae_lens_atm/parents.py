"""Which latents imply which, and a pressure that keeps a child's decoder off its parents'.

This part is ours, not the paper's. A mask makes parents work beside a silent child; it does nothing
against the child that carries its parent along, and the reward for that (one active latent instead
of two) remains. Here the child pays for what it carries.

Latent ``j`` *implies* a more important latent ``i`` if the inputs on which ``j`` fires hold as much
of ``i``'s direction as inputs do on which ``i`` fires. That is read off the inputs and not off the
activations, so it holds whether the parent's latent fires beside the child or was absorbed by it,
and two features that merely overlap in a crowded space do not pass for parent and child.
"""

import torch
from torch import Tensor

from sae_lens_atm.importance import ExactBuffers, Signals, moving_average


def unit_rows(matrix: Tensor) -> Tensor:
    """The rows, each of length 1; a row of zeros stays one."""
    return matrix / matrix.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def lift(inputs: Tensor, magnitude: Tensor, mean_input: Tensor, directions: Tensor) -> Tensor:
    """``L_ji = <E[a_j x] / E[a_j] - E[x], u_i>``: how much more of direction ``u_i`` an input holds
    when latent ``j`` fires (weighted by how strongly) than it does on average.

    Args:
        inputs: ``E[a_j x]`` of some latents, shape ``(latents, d_in)``.
        magnitude: ``E[a_j]`` of them, shape ``(latents,)``.
        mean_input: ``E[x]``, shape ``(d_in,)``.
        directions: unit rows ``u_i``, shape ``(d_sae, d_in)``.
    """
    typical = inputs / magnitude.clamp(min=1e-12).unsqueeze(1)
    return (typical - mean_input) @ directions.to(typical.dtype).T


def implied_parents(
    lift: Tensor, averages: Signals, importance: Tensor, rows: Tensor, tau: float
) -> Tensor:
    """True at ``[j, i]`` where latent ``rows[j]`` implies latent ``i``:

        L_ji >= tau M_i / F_i   and   Importance_i > Importance_j

    ``M_i / F_i`` is the mean activation of ``i`` where it fires. Latents that never fired imply
    nothing and are implied by nothing.
    """
    fired = averages.frequency > 0
    when_active = averages.magnitude / averages.frequency.where(fired, 1.0)
    implied = lift >= tau * when_active
    return implied & (importance > importance[rows, None]) & fired & fired[rows, None]


def carried_energy(children: Tensor, directions: Tensor, implied: Tensor, energy: Tensor) -> Tensor:
    """``sum_j E[a_j^2] sum_i max(<u_j, u_i>, 0)^2`` over the parents ``i`` that ``j`` implies: the
    energy that children add along their parents' directions, in units of the squared error.

    Its gradient reaches the children alone.

    Args:
        children: unit rows ``u_j``, shape ``(latents, d_in)``.
        directions: unit rows ``u_i``, shape ``(d_sae, d_in)``.
        implied: of `implied_parents`, shape ``(latents, d_sae)``.
        energy: ``E[a_j^2]``, shape ``(latents,)``.
    """
    overlap = (children @ directions.detach().T).clamp(min=0).square()
    return torch.where(implied, overlap, 0.0).sum(1) @ energy.to(overlap.dtype)


class ParentTracker(ExactBuffers):
    """Moving averages of the inputs on which each latent fires, in float32.

    Only ratios of them are used, which need no bias correction. A latent that a step did not see
    keeps its own.
    """

    inputs: Tensor
    """``E[a_j x]``, shape ``(d_sae, d_in)``."""
    magnitude: Tensor
    """``E[a_j]``, shape ``(d_sae,)``."""
    mean_input: Tensor
    """``E[x]``, shape ``(d_in,)``."""
    weight: Tensor
    """How much of `mean_input` has been filled."""
    exact_buffers = ("inputs", "magnitude", "mean_input", "weight")

    def __init__(
        self, d_in: int, d_sae: int, decay: float = 0.99, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.decay = decay
        shapes = {"inputs": (d_sae, d_in), "magnitude": (d_sae,), "mean_input": (d_in,)}
        for name, shape in {**shapes, "weight": ()}.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=device))

    @torch.no_grad()
    def update(self, acts: Tensor, x: Tensor, exposure: Tensor) -> None:
        """Take in one batch.

        Args:
            acts: activations under unit decoder rows, 0 where masked, shape ``(batch, d_sae)``.
            x: what the SAE reconstructs, shape ``(batch, d_in)``.
            exposure: share of the batch in which each latent was kept; 0 leaves its averages
                alone, and so does a batch that is not finite.
        """
        size = x.shape[0]
        share = size * exposure.clamp(min=1e-12)
        inputs = (acts.T @ x.to(acts.dtype)).float() / share.unsqueeze(1)
        magnitude = acts.sum(0, dtype=torch.float32) / share
        seen = (exposure > 0) & inputs.isfinite().all(1) & magnitude.isfinite()
        mean_input = x.mean(0, dtype=torch.float32)
        finite = mean_input.isfinite().all() & seen.any()
        one = torch.ones_like(self.weight)
        for old, new, where in (
            (self.inputs, inputs, seen.unsqueeze(1)),
            (self.magnitude, magnitude, seen),
            (self.mean_input, mean_input, finite),
            (self.weight, one, finite),
        ):
            old.copy_(moving_average(old, new, self.decay, where))

    def lift(self, directions: Tensor, rows: Tensor) -> Tensor:
        """`lift` of some latents."""
        mean_input = self.mean_input / self.weight.clamp(min=1e-12)
        return lift(self.inputs[rows], self.magnitude[rows], mean_input, directions)
