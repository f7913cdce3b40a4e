"""KronSAE: an encoder that is factorised into pairs of few directions.

Kurochkin, Aksenov, Laptev, Gavrilov, Balagansky: *Kronecker Factorization Improves Efficiency and
Interpretability of Sparse Autoencoders*, arXiv:2505.22255, equations 2 to 4 and appendix H. The F =
h m n latents form h heads of m n. Head k has two thin encoders, P^k of m and Q^k of n rows:

    u^k = P^k x + b_P^k,    v^k = Q^k x + b_Q^k
    z^k_ij = mAND(u^k_i, v^k_j) = sqrt(u^k_i v^k_j) if u^k_i > 0 and v^k_j > 0, otherwise 0
    f = TopK(z),    x_hat = W_dec f + b_dec,    W_dec rows of norm 1, at first P^k_i + Q^k_j

The encoder has d_in h (m + n) weights in place of d_in h m n.

Open, and our choice:

- The code of appendix H adds 1e-5 under the root, so that no activation is 0. The formula does not.
- The paper sweeps m, n and h. m = 2, n = 4 gave its best explained variance in table 1.
- The rows of P and Q start normal, with a standard deviation of 1 / sqrt(2 d_sae).
- L_aux is SAELens' own, with the paper's weight of 1/32.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from sae_lens import (
    SAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import SAE
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_atm.baselines.shared import require, require_one_scale


@dataclass
class KronSAEConfig(TopKSAEConfig):
    """Configuration of a saved KronSAE. The fields are those of `KronTrainingSAEConfig`."""

    kron_m: int = 2
    kron_n: int = 4

    @override
    @classmethod
    def architecture(cls) -> str:
        return "kronsae"


@dataclass
class KronTrainingSAEConfig(TopKTrainingSAEConfig):
    """Configuration of a KronSAE.

    Args:
        kron_m: m, the number of rows of P in each head.
        kron_n: n, the number of rows of Q. The number of heads is d_sae / (m n).
        rescale_acts_by_decoder_norm: must be true: decoder rows count as having norm 1.
    """

    aux_loss_coefficient: float = 1 / 32
    apply_b_dec_to_input: bool = False
    kron_m: int = 2
    kron_n: int = 4

    @override
    @classmethod
    def architecture(cls) -> str:
        return "kronsae"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return KronSAEConfig

    @override
    def __post_init__(self) -> None:
        require(self, "kron_m", self.kron_m >= 1, "1 or more")
        fits = self.kron_n >= 1 and self.d_sae % (self.kron_m * self.kron_n) == 0
        allowed = f"1 or more, and kron_m kron_n a divisor of d_sae = {self.d_sae}"
        require(self, "kron_n", fits, allowed)
        require(self, "rescale_acts_by_decoder_norm", self.rescale_acts_by_decoder_norm, "true")
        require_one_scale(self)
        super().__post_init__()


def mand(pre: Tensor, m: int, n: int) -> Tensor:
    """Return the activations before TopK.

    Args:
        pre: u and v of each head, ``(..., h (m + n))``.
        m: the number of values of u in a head.
        n: the number of values of v in a head.

    Returns:
        z, in the order of heads, i and j, ``(..., h m n)``.
    """
    heads = pre.relu().unflatten(-1, (-1, m + n))
    roots = torch.where(heads > 0, heads, 1.0).sqrt()  # the root has no gradient at 0
    roots = torch.where(heads > 0, roots, 0.0)
    return (roots[..., :m].unsqueeze(-1) * roots[..., m:].unsqueeze(-2)).flatten(-3)


def pair_sums(encoder: Tensor, m: int, n: int) -> Tensor:
    """Return ``P_i + Q_j`` of each head, ``(h m n, d_in)``."""
    heads = encoder.T.unflatten(0, (-1, m + n))
    return (heads[:, :m].unsqueeze(2) + heads[:, m:].unsqueeze(1)).flatten(0, 2).contiguous()


class KronSAE(TopKSAE):
    """A saved KronSAE."""

    cfg: KronSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        _make_encoder(self, self.cfg)

    @override
    def encode(self, x: Tensor) -> Tensor:
        pre = self.process_sae_in(x) @ self.W_enc + self.b_enc
        z = self.hook_sae_acts_pre(mand(pre, self.cfg.kron_m, self.cfg.kron_n))
        return self.hook_sae_acts_post(self.activation_fn(z))

    @override
    def fold_W_dec_norm(self) -> None:
        """Do nothing: the rows of a saved KronSAE have norm 1."""


class KronTrainingSAE(TopKTrainingSAE):
    """A KronSAE in training."""

    cfg: KronTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        _make_encoder(self, self.cfg)
        encoder = self.W_enc.data
        nn.init.normal_(encoder, std=1 / sqrt(2 * self.cfg.d_sae))
        rows = pair_sums(encoder, self.cfg.kron_m, self.cfg.kron_n)
        self.W_dec.data = rows / rows.norm(dim=-1, keepdim=True)

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = self.process_sae_in(x) @ self.W_enc + self.b_enc
        z = self.hook_sae_acts_pre(mand(pre, self.cfg.kron_m, self.cfg.kron_n))
        return self.hook_sae_acts_post(self.activation_fn(z)), z

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        # mAND(s u, s v) = s mAND(u, v), and the rows of the decoder keep their norm of 1.
        self.b_enc.data /= scaling_factor
        self.b_dec.data /= scaling_factor
        self.cfg.normalize_activations = "none"

    @override
    def fold_W_dec_norm(self) -> None:
        """Do nothing: the norm of decoder rows has no effect."""

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        TrainingSAE.process_state_dict_for_saving_inference(self, state_dict)
        rows = state_dict["W_dec"]
        state_dict["W_dec"] = rows / rows.norm(dim=-1, keepdim=True)


def _make_encoder(sae: SAE[Any], cfg: KronSAEConfig | KronTrainingSAEConfig) -> None:
    """Replace the encoder by one with ``m + n`` columns for each head."""
    width = cfg.d_sae // (cfg.kron_m * cfg.kron_n) * (cfg.kron_m + cfg.kron_n)
    options: dict[str, Any] = {"dtype": sae.dtype, "device": sae.device}
    sae.W_enc = nn.Parameter(torch.zeros(cfg.d_in, width, **options))
    sae.b_enc = nn.Parameter(torch.zeros(width, **options))


register_sae_class("kronsae", KronSAE, KronSAEConfig)
register_sae_training_class("kronsae", KronTrainingSAE, KronTrainingSAEConfig)
