"""Penalty on frequent latents: a loss on activations, larger for latents that fire often.

This part is ours, not the paper's. BatchTopK limits how many latents fire, and not which. On a
language model a sixth of its latents then fire on more than a tenth of the tokens. The penalty
makes it cheaper to explain an input with latents that fire rarely.
"""

from torch import Tensor

from sae_lens_atm.method.importance import Signals, normalize


def frequency_weights(signals: Signals) -> Tensor:
    """Return ``v_i = s w_i / mean_j w_j``, with ``w_i = F_i (1 - F_i)^2``, ``(d_sae,)``.

    ``w_i`` is largest at ``F_i = 1/3``. A latent that fires on nearly every input is spared: it
    describes a direction in which all inputs vary, and the penalty would only make it too small.

    ``s = sum_j M_j / sum_j F_j`` is the mean length of an active latent's part of the
    reconstruction. With it the loss ``sum_i v_i E[a_i |d_i|]`` has the units of the squared error,
    so that one coefficient suits activations of any scale. If no latent has fired the weights are
    zero.
    """
    frequency = signals.frequency
    fired = frequency.sum()
    length = signals.magnitude.sum() / fired.where(fired > 0, 1.0)
    return length * normalize(frequency * (1 - frequency) ** 2)
