"""Archetypal SAE: decoder rows near the convex hull of data.

Fel, Lubana, Prince, Kowal, Boutin, Papadimitriou, Wang, Wattenberg, Ba, Konkle: *Archetypal SAE:
Adaptive and Stable Dictionary Learning for Concept Extraction in Large Vision Models*,
arXiv:2502.12892, with details from the authors' library overcomplete. This is the relaxed form
(RA-SAE) with TopK:

    D = e^mu (W C + Lambda),    W >= 0 with rows that sum to 1,    |Lambda_i| <= delta

C holds points of the data, and D is the decoder. W, Lambda and mu are trained. Before each step
W is clipped at 0 and its rows are divided by their sums, and rows of Lambda longer than delta are
shortened. The saved decoder is that after the last step, so W and Lambda may be one step outside.
At first Lambda and mu are 0, and each row of W selects a point.

Open, and our choice:

- C: the paper takes k-means centroids of the data set. A trainer of SAELens has not seen the data,
  so C holds the centroids of the first batch (`archetypal_points` of them).
- With fewer points than latents, several latents begin at one point.
- The first encoders are random. They are divided by the median length of the points.
- One process only: the points of several processes would differ.
- L_aux is SAELens' own. delta is in units of the inputs.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import scipy.cluster.vq
import torch
from sae_lens import (
    SAEConfig,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    register_sae_training_class,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_atm.baselines.shared import require, require_one_scale
from sae_lens_atm.method.buffers import ExactBuffers

_TINY = 1e-8


@dataclass
class ArchetypalTrainingSAEConfig(TopKTrainingSAEConfig):
    """Configuration of a relaxed archetypal SAE.

    Args:
        archetypal_points: number of points in C, at most the size of a batch.
        archetypal_delta: delta, the longest deviation of a decoder row from the hull.
        archetypal_seed: seed of the centroids and of the first encoders.
    """

    archetypal_points: int = 256
    archetypal_delta: float = 1.0
    archetypal_seed: int = 0

    @override
    @classmethod
    def architecture(cls) -> str:
        return "archetypal"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig

    @override
    def __post_init__(self) -> None:
        require(self, "archetypal_points", self.archetypal_points >= 1, "1 or more")
        require(self, "archetypal_delta", 0 <= self.archetypal_delta <= 1e6, "from 0 to 1e6")
        require_one_scale(self)
        super().__post_init__()


class ArchetypalTrainingSAE(ExactBuffers, TopKTrainingSAE):
    """An archetypal SAE. It is saved as SAELens' `topk`."""

    cfg: ArchetypalTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    mixture: nn.Parameter
    """W, ``(d_sae, points)``."""
    relaxation: nn.Parameter
    """Lambda, ``(d_sae, d_in)``."""
    log_scale: nn.Parameter
    """mu."""
    points: Tensor
    """C, ``(points, d_in)``."""
    has_points: Tensor

    @property
    def W_dec(self) -> Tensor:  # noqa: N802  # pyright: ignore[reportIncompatibleVariableOverride]
        """The decoder D, ``(d_sae, d_in)``, computed once in a training step."""
        known = vars(self).get("_dictionary")
        if known is not None:
            return known
        return self.log_scale.exp() * (self.mixture @ self.points + self.relaxation)

    @override
    def initialize_weights(self) -> None:
        cfg = self.cfg
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in, **options))
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, **options))
        chosen = torch.arange(cfg.d_sae, device=self.device) % cfg.archetypal_points
        self.mixture = nn.Parameter(torch.eye(cfg.archetypal_points, **options)[chosen])
        self.relaxation = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in, **options))
        self.log_scale = nn.Parameter(torch.zeros((), **options))
        # Random directions of length 1, until the data are seen.
        points = torch.randn(cfg.archetypal_points, cfg.d_in, **options)
        self.register_buffer("points", points / points.norm(dim=1, keepdim=True))
        self.register_buffer("has_points", torch.zeros((), dtype=torch.bool, device=self.device))
        self.W_enc = nn.Parameter(self._random_encoders())

    def _random_encoders(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.cfg.archetypal_seed)
        encoders = torch.empty(self.cfg.d_in, self.cfg.d_sae)
        nn.init.kaiming_uniform_(encoders, mode="fan_out", generator=generator)
        return encoders.to(dtype=self.dtype, device=self.device)

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if not bool(self.has_points):
            self.take_points(step_input.sae_in)
        self.project()
        vars(self)["_dictionary"] = self.W_dec
        try:
            return super().training_forward_pass(step_input)
        finally:
            del vars(self)["_dictionary"]

    @torch.no_grad()
    def take_points(self, batch: Tensor) -> None:
        """Set C to centroids of a batch.

        Raises:
            ValueError: the batch is too small.
        """
        batch, count = batch.flatten(0, -2), self.cfg.archetypal_points
        if len(batch) < count:
            raise ValueError(
                f"archetypal_points must be at most the batch size, {len(batch)}, got {count}"
            )
        means: Any = scipy.cluster.vq.kmeans2  # pyright: ignore[reportUnknownMemberType]
        with warnings.catch_warnings():
            # A centroid without samples stays where it is.
            warnings.simplefilter("ignore")
            samples = batch.double().cpu().numpy()
            centres, _ = means(samples, count, minit="++", seed=self.cfg.archetypal_seed)
        self.points.copy_(torch.from_numpy(centres))
        self.has_points.fill_(True)
        # Rows of D are as long as inputs, so activations of usual size would give reconstructions
        # far too long. Drawn again, because a first batch that was rejected has divided them, too.
        self.W_enc.copy_(
            self._random_encoders() / self.points.norm(dim=1).median().clamp(min=_TINY)
        )

    @torch.no_grad()
    def project(self) -> None:
        """Make W a matrix of shares, and the rows of Lambda at most delta long."""
        shares = self.mixture.data.relu_()
        shares /= shares.sum(1, keepdim=True) + _TINY
        lengths = self.relaxation.data.norm(dim=1, keepdim=True)
        self.relaxation.data *= (self.cfg.archetypal_delta / lengths.clamp(min=_TINY)).clamp(max=1)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        self.W_enc.data *= scaling_factor
        for tensor in (self.b_dec.data, self.relaxation.data, self.points):
            tensor /= scaling_factor
        self.cfg.normalize_activations = "none"

    @override
    def fold_W_dec_norm(self) -> None:
        """Do nothing: the norm of decoder rows has no effect in training."""

    @override
    @torch.no_grad()
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        for name in ("mixture", "relaxation", "log_scale", "points", "has_points"):
            del state_dict[name]
        state_dict["W_dec"] = self.W_dec.clone()
        super().process_state_dict_for_saving_inference(state_dict)


register_sae_training_class("archetypal", ArchetypalTrainingSAE, ArchetypalTrainingSAEConfig)
