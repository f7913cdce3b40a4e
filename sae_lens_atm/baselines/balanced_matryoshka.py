"""Balanced Matryoshka: Matryoshka SAEs whose inner losses have smaller weights.

Chanin, Dulka, Garriga-Alonso: *Feature Hedging: Correlated Features Break Narrow Sparse
Autoencoders*, arXiv:2505.11756. With levels m = 1 (innermost) to M, and L_m the squared error of
the reconstruction from the latents of levels 1 to m:

    L = sum_m beta_m L_m + alpha L_aux,    beta_m = beta^(M - m)

beta = 1 is SAELens' `matryoshka_batchtopk`: narrow levels hedge, they mix correlated features.
beta = 0 is BatchTopK, but for the auxiliary loss: its latents absorb. A value between balances
both.

The paper leaves open which beta is best for other data. Its code tries 0, .1, .25, .5, .75, 1, 2
and 5, and so can a comparison file. 0.75 is our default. The widths are those of its code: d_sae /
256, / 64, / 16, / 4 and d_sae. Its auxiliary loss is that of each level
(`use_matryoshka_aux_loss`).
"""

from dataclasses import dataclass

from sae_lens import (
    BatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    register_sae_training_class,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from typing_extensions import override

from sae_lens_atm.baselines.shared import require, require_one_scale

_DIVISORS = (256, 64, 16, 4, 1)


@dataclass
class BalancedMatryoshkaTrainingSAEConfig(MatryoshkaBatchTopKTrainingSAEConfig):
    """Configuration of a balanced Matryoshka SAE.

    Args:
        matryoshka_balance: beta, the weight of a level's loss relative to that of the next wider
            level.
    """

    use_matryoshka_aux_loss: bool = True
    matryoshka_balance: float = 0.75

    @override
    @classmethod
    def architecture(cls) -> str:
        return "balanced_matryoshka"

    @override
    def __post_init__(self) -> None:
        require(self, "matryoshka_balance", 0 <= self.matryoshka_balance <= 1e3, "from 0 to 1000")
        if not self.matryoshka_widths:
            self.matryoshka_widths = sorted({self.d_sae // divisor for divisor in _DIVISORS} - {0})
        require_one_scale(self, or_whitening=True)
        super().__post_init__()


class BalancedMatryoshkaTrainingSAE(MatryoshkaBatchTopKTrainingSAE):
    """A balanced Matryoshka SAE. It is saved as SAELens' `jumprelu`."""

    cfg: BalancedMatryoshkaTrainingSAEConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = BatchTopKTrainingSAE.training_forward_pass(self, step_input)
        if self.cfg.matryoshka_balance == 0:
            return output
        inner = len(self.cfg.matryoshka_widths) - 1  # the widest level is the whole SAE
        for level, (width, sae_out) in enumerate(self._iterable_decode(output.feature_acts)):
            error = self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()
            weighted = self.cfg.matryoshka_balance ** (inner - level) * error
            output.losses[f"inner_mse_loss_{width}"] = weighted
            output.loss = output.loss + weighted
        return output


register_sae_training_class(
    "balanced_matryoshka", BalancedMatryoshkaTrainingSAE, BalancedMatryoshkaTrainingSAEConfig
)
