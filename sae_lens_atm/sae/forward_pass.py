"""One pass of a batch through an SAE, by dense or by sparse products."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from sae_lens import TrainingSAE
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from sae_lens_atm.method.budgets import sparse_errors
from sae_lens_atm.method.selection import largest_of_each
from sae_lens_atm.method.sparse import Pattern, dots_at, squared_error
from sae_lens_atm.method.statistics import BatchStatistics, dense_statistics, sparse_statistics

if TYPE_CHECKING:
    from sae_lens_atm.sae.activations import BatchTopKATM
    from sae_lens_atm.sae.atm_sae import ATMTrainingSAE

# SAELens' tensors with one entry for each latent, and the dimension of the latents.
_LATENT_DIMENSION = {"W_enc": 1, "b_enc": 0, "W_dec": 0}
# What SAELens' run-time normalization stores on the SAE in `encode` and deletes in `decode`.
_NORMALIZATION_STATE = ("x_norm_coeff", "ln_mu", "ln_std")


@dataclass(frozen=True)
class ForwardPass:
    """The result of one pass of a batch, with all latents or under a mask."""

    feature_acts: Tensor
    """Activations, dense or sparse COO, shape ``(..., d_sae)``."""
    hidden_pre: Tensor
    """Pre-activations, shape ``(..., d_sae)``."""
    sae_out: Tensor
    """Reconstructions, shape ``(..., d_in)``."""
    losses: dict[str, Tensor]
    """``"mse_loss"`` and the losses that SAELens' class adds: sparsity, dead latents."""
    statistics: Callable[[Tensor], BatchStatistics]
    """Compute the statistics of the batch, given which latents were kept."""
    weighted_length: Callable[[Tensor], Tensor]
    """Compute ``sum_i v_i E[a_i |d_i|]`` with a gradient, given the weights ``v``."""
    budget_errors: Callable[[Sequence[int]], list[Tensor]]
    """Compute ``E_b`` of `method.budgets` with a gradient, given the budgets ``b``."""


def dense_pass(
    sae: ATMTrainingSAE, step_input: TrainStepInput, acts: Tensor, hidden_pre: Tensor
) -> ForwardPass:
    """Decode activations with SAELens' own code, and compute the losses."""
    x = step_input.sae_in
    state = {name: getattr(sae, name) for name in _NORMALIZATION_STATE if hasattr(sae, name)}

    def decode(acts: Tensor) -> Tensor:
        decoded = sae.decode(acts)
        for name, value in state.items():  # a step may decode twice
            setattr(sae, name, value)
        return decoded

    def mean_error(decoded: Tensor) -> Tensor:
        return sae.mse_loss_fn(decoded, x).sum(dim=-1).mean()

    sae_out = decode(acts)

    def in_units_of_input(acts: Tensor) -> Tensor:
        if not state:  # a copy of all activations would be made for nothing
            return acts
        return acts * (state.get("ln_std", 1.0) / state.get("x_norm_coeff", 1.0))

    def statistics(keep: Tensor) -> BatchStatistics:
        scaled = in_units_of_input(acts.detach())
        inputs, scaled, outputs = (t.flatten(0, -2) for t in (x, scaled, sae_out))
        return dense_statistics(inputs, scaled, sae.decoder_rows(), outputs, keep)

    def weighted_length(weights: Tensor) -> Tensor:
        lengths = in_units_of_input(acts).flatten(0, -2).mean(0)
        if not sae.cfg.rescale_acts_by_decoder_norm:  # otherwise SAELens has multiplied by |d_i|
            lengths = lengths * sae.W_dec.norm(dim=-1)
        return lengths @ weights.to(lengths.dtype)

    def budget_errors(budgets: Sequence[int]) -> list[Tensor]:
        return [mean_error(decode(part)) for part in largest_of_each(acts, budgets)]

    error = mean_error(sae_out)
    losses = _with_auxiliary_losses(sae, step_input, error, acts, hidden_pre, sae_out)
    return ForwardPass(
        acts, hidden_pre, sae_out, losses, statistics, weighted_length, budget_errors
    )


def sparse_pass(sae: BatchTopKATM, step_input: TrainStepInput, hidden_pre: Tensor) -> ForwardPass:
    """Decode the ``k * samples`` largest positive pre-activations of the batch by sparse products.

    Args:
        hidden_pre: pre-activations without gradient, rescaled by the decoder's norms if
            ``cfg.rescale_acts_by_decoder_norm``; zero for masked latents.
    """
    target, x = step_input.sae_in, sae.process_sae_in(step_input.sae_in)
    length = sae.get_W_dec_norm()
    places, chosen = sae.context.largest(sae.candidates(hidden_pre), sae.cfg.k)
    d_sae = hidden_pre.shape[1]
    pattern = Pattern(places // d_sae, places % d_sae, (len(x), d_sae))
    # `chosen` are activations for decoder rows of unit length. Rescale them to the actual rows.
    known = chosen / length[pattern.columns] if sae.cfg.rescale_acts_by_decoder_norm else chosen
    acts = dots_at(x, sae.W_enc.T, pattern, sae.b_enc, known)
    error, sae_out, aligned = squared_error(target, acts, sae.W_dec, sae.b_dec, pattern)
    shown = pattern.coo(chosen)
    losses = _with_auxiliary_losses(sae, step_input, error, shown, hidden_pre, sae_out)

    def statistics(keep: Tensor) -> BatchStatistics:
        # NaN is never among the largest values. The error shows whether the batch has any.
        measured = keep & error.detach().isfinite()
        return sparse_statistics(target, acts, aligned, pattern, length, measured)

    def weighted_length(weights: Tensor) -> Tensor:
        # The gradient must reach |d_i|. Otherwise longer rows with smaller activations avoid it.
        scaled = weights.to(acts.dtype) * sae.W_dec.norm(dim=-1)
        return (acts @ scaled[pattern.columns]) / len(x)

    budget_errors = partial(sparse_errors, target, acts, sae.W_dec, sae.b_dec, pattern, chosen)
    return ForwardPass(
        shown, hidden_pre, sae_out, losses, statistics, weighted_length, budget_errors
    )


def _with_auxiliary_losses(
    sae: ATMTrainingSAE,
    step_input: TrainStepInput,
    error: Tensor,
    acts: Tensor,
    hidden_pre: Tensor,
    sae_out: Tensor,
) -> dict[str, Tensor]:
    losses = sae.calculate_aux_loss(
        step_input=step_input, feature_acts=acts, hidden_pre=hidden_pre, sae_out=sae_out
    )
    return {"mse_loss": error, **cast(dict[str, Tensor], losses)}


@contextmanager
def restricted_to(sae: TrainingSAE[Any], latents: Tensor) -> Generator[None]:
    """Temporarily restrict an SAE to some of its latents.

    SAELens' code then computes nothing for the other latents, and they get zero gradient.
    """
    selected = {
        name: getattr(sae, name).index_select(dim, latents)
        for name, dim in _LATENT_DIMENSION.items()
    }
    # An instance attribute takes precedence over the parameter of the same name.
    vars(sae).update(selected)
    try:
        yield
    finally:
        for name in selected:
            del vars(sae)[name]


def mean_l0(acts: Tensor) -> Tensor:
    """Return the mean number of active latents of a sample."""
    return (acts.values() if acts.is_sparse else acts).count_nonzero() / acts.shape[:-1].numel()
