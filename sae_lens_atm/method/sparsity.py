"""Penalty on frequent latents: a loss on activations, larger for latents that fire often.

This part is ours, not the paper's. BatchTopK limits how many latents fire, and not which. On a
language model a sixth of its latents then fire on more than a tenth of the tokens. The penalty
makes it cheaper to explain an input with latents that fire rarely.
"""

from torch import Tensor

from sae_lens_atm.method.importance import Signals, normalize


def frequency_weights(signals: Signals) -> Tensor:
    """Return ``v_i = s F_i / mean_j F_j``, with ``s = sum_j M_j / sum_j F_j``, ``(d_sae,)``.

    ``s`` is the mean length of an active latent's part of the reconstruction. With it the loss
    ``sum_i v_i E[a_i |d_i|]`` has the units of the squared error, so that one coefficient suits
    activations of any scale. If no latent has fired the weights are zero.
    """
    fired = signals.frequency.sum()
    length = signals.magnitude.sum() / fired.where(fired > 0, 1.0)
    return length * normalize(signals.frequency)
