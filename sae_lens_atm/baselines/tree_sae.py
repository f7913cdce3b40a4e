"""Tree SAE: a latent may fire only where its parent fires.

Cao, Nhat, Alharbi, Nguyen, Thai: *Tree SAE: Learning Hierarchical Feature Structures in Sparse
Autoencoders*, arXiv:2605.07922; details from the authors' code (github.com/tue147/tree-sae). The
latents form layers l = 1 to L of s_l latents. Each latent i of a layer above the first has one
parent a(i) among all latents of lower layers and a root that always fires:

    z_l = TopK_{k_l}(ReLU(W_enc (x - b_dec) + b_enc)_l * 1[z_{a(i)} > 0])             (eq. 6)
    L = sum_l |x - (b_dec + sum_{t <= l} W_dec,t z_t)|^2 + sum_l alpha_l L_aux,l      (eq. 7 to 9)

L_aux,l: dead latents of layer l, where their parents fire, reconstruct the error of the layers up
to l. alpha_1 = 1/32, the other alpha are 0. The error is divided by Var(x) and L_aux by the
variance of that error. This file multiplies both by Var(x), the scale of SAELens' losses.

Parents are drawn at random and then reallocated. Each step adds its loss, divided by the number of
possible parents that fired, to the capacity C_p of each of these. At a reallocation k_p children of
a layer, in total s_l, are given to its possible parents p so that the smallest C_p / k_p is as
large as possible (algorithm 1). Dead children of parents with more than k_p move to parents with
fewer (algorithm 2). Parents must be alive. The first reallocation is at step 3000, each interval is
twice the one before and at most 10,000 steps, and at step 50,000 all dead children move to the
root. These are shares .03, .1 and .5 of the paper's run, and shares of `schedule_steps` here.

What is left open, and our choice:

- k_l, which the text that we have does not give: k is divided evenly (`tree_k`).
- s_l is d_sae times 1/16, 2/16, 6/16 and 7/16, as in the paper's largest tree (`tree_widths`).
- Dead: as the trainer counts it (`dead_feature_window`).
- The code standardises each input. SAELens' `normalize_activations` is left to the user.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from sae_lens import (
    SAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import SAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import act_times_W_dec, calculate_topk_aux_acts
from torch import Tensor
from typing_extensions import override

from sae_lens_atm.baselines.shared import CountsSteps, require
from sae_lens_atm.method.buffers import ExactBuffers

_PARTS = (1, 2, 6, 7)
_AUXILIARY_LATENTS = 256
