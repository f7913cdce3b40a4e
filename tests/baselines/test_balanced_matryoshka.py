import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig, MatryoshkaBatchTopKTrainingSAEConfig, TrainingSAE

from sae_lens_atm.baselines.balanced_matryoshka import BalancedMatryoshkaTrainingSAEConfig
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.training.run_file import parse_run
from tests.helpers import step_input

SIZE = {"d_in": 8, "d_sae": 32, "k": 3}
WIDTHS = [2, 8, 32]


def step_of(cfg, x):
    torch.manual_seed(0)
    sae = TrainingSAE.from_dict(cfg.to_dict())
    output = sae.training_forward_pass(step_input(x))
    output.loss.backward()
    return output, sae.W_dec.grad


def test_the_weights_fall_by_beta_with_each_narrower_level():
    x = torch.randn(64, 8)
    theirs, _ = step_of(MatryoshkaBatchTopKTrainingSAEConfig(**SIZE, matryoshka_widths=WIDTHS), x)
    ours, _ = step_of(
        BalancedMatryoshkaTrainingSAEConfig(
            **SIZE, matryoshka_widths=WIDTHS, matryoshka_balance=0.5
        ),
        x,
    )
    weights = {"mse_loss": 1, "inner_mse_loss_8": 0.5, "inner_mse_loss_2": 0.25}
    for name, weight in weights.items():
        torch.testing.assert_close(ours.losses[name], weight * theirs.losses[name])
    torch.testing.assert_close(ours.loss, torch.stack(list(ours.losses.values())).sum())


@pytest.mark.parametrize(
    ("balance", "cfg"),
    [
        (1.0, MatryoshkaBatchTopKTrainingSAEConfig(**SIZE, matryoshka_widths=WIDTHS)),
        (0.0, BatchTopKTrainingSAEConfig(**SIZE)),
    ],
)
def test_its_limits_are_matryoshka_and_batchtopk(balance, cfg):
    x = torch.randn(64, 8)
    balanced = BalancedMatryoshkaTrainingSAEConfig(
        **SIZE, matryoshka_widths=WIDTHS, matryoshka_balance=balance
    )
    (ours, our_gradient), (theirs, their_gradient) = step_of(balanced, x), step_of(cfg, x)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(our_gradient, their_gradient)


def test_the_default_widths_are_the_papers():
    def widths(d_sae):
        return BalancedMatryoshkaTrainingSAEConfig(d_in=8, d_sae=d_sae).matryoshka_widths

    assert widths(32768) == [128, 512, 2048, 8192, 32768]
    assert widths(256) == [1, 4, 16, 64, 256]
    assert widths(32) == [2, 8, 32]


def test_widths_that_do_not_increase_are_refused():
    sae = {"architecture": "balanced_matryoshka", **SIZE, "matryoshka_widths": [8, 8, 32]}
    with pytest.raises(SettingsError, match=r"^sae.*matryoshka_widths must be strictly increasing"):
        parse_run({"runner": "synthetic", "hierarchy_model": {"hidden_dim": 8}, "sae": sae})
