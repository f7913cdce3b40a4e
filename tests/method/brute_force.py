"""What the sparsity losses are checked against: BatchTopK by brute force."""

import torch

from tests.helpers import make_sae


def sae_of_uneven_rows(d_sae, k, rescaled, kernels, **fields):
    """Return an SAE in float64 whose decoder rows have lengths from .5 to 2 times the usual."""
    torch.manual_seed(0)
    sae = make_sae(
        d_sae=d_sae,
        k=k,
        dtype="float64",
        kernels=kernels,
        rescale_acts_by_decoder_norm=rescaled,
        aux_loss_coefficient=0.0,
        mask_rate=0.0,
        parent_weight=0.0,
        **fields,
    )
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 2, d_sae, dtype=torch.float64)[:, None])
    return sae


def batchtopk(sae, x):
    """Return the activations, and the length of the row that an activation of each multiplies."""
    lengths = sae.W_dec.norm(dim=1)
    if sae.cfg.rescale_acts_by_decoder_norm:
        scale, rows = lengths, torch.ones_like(lengths)
    else:
        scale, rows = torch.ones_like(lengths), lengths
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * scale
    least = pre.flatten().topk(round(sae.cfg.k * len(x))).values[-1]
    return (pre * (pre >= least)).relu(), rows
