import pytest
import torch
from sae_lens import TrainingSAE

from sae_lens_atm.baselines.top_afa import TopAFATrainingSAEConfig, norm_matched
from sae_lens_atm.compare.plan.l0_target import find_l0_parameter
from tests.helpers import step_input


def make(**fields):
    return TrainingSAE.from_dict(
        TopAFATrainingSAEConfig(**{"d_in": 8, "d_sae": 30, **fields}).to_dict()
    )


def test_as_many_latents_as_reach_the_norm():
    acts = torch.tensor([[4.0, 1.0, 3.0, 12.0]]).repeat(5, 1)
    # In falling order the norms are 12, sqrt(160) = 12.65, 13, sqrt(170) = 13.04.
    norm = torch.tensor([2.0, 12.6, 12.9, 13.01, 50.0])
    expected = [[0, 0, 0, 12], [4, 0, 0, 12], [4, 0, 3, 12], [4, 0, 3, 12], [4, 1, 3, 12]]
    assert norm_matched(acts, norm)[0].tolist() == expected
    assert norm_matched(acts, norm, 1)[0].tolist() == expected


def test_squares_do_not_overflow_in_float16():
    acts, norm = torch.tensor([[300.0, 200, 100, 50]]), torch.tensor([380.0])
    expected = [[300, 200, 100, 50]]
    assert norm_matched(acts, norm)[0].tolist() == expected
    assert norm_matched(acts.half(), norm.half())[0].tolist() == expected


def test_latents_of_orthogonal_rows_are_all_found():
    """The paper's case: with orthogonal rows of norm 1 the true latents have the input's norm."""
    z = (torch.rand(50, 8) < 0.4) * (0.5 + torch.rand(50, 8))
    rows = torch.linalg.qr(torch.randn(8, 8)).Q
    x = z @ rows
    noisy = (x @ rows.T).clamp(min=0)
    torch.testing.assert_close(norm_matched(noisy, x.norm(dim=1))[0], z, atol=1e-5, rtol=0)


def slow(acts, norm):
    result = torch.zeros_like(acts)
    for row, target, kept in zip(acts, norm, result, strict=True):
        order = row.argsort(descending=True)
        gaps = [abs(float(row[order[: j + 1]].norm()) - float(target)) for j in range(len(row))]
        chosen = order[: gaps.index(min(gaps)) + 1]
        kept[chosen] = row[chosen]
    return result


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_selection_is_that_of_the_slow_version(scale):
    acts = torch.randn(40, 300, dtype=torch.float64).relu()
    norm = scale * torch.rand(40, dtype=torch.float64) * 10
    torch.testing.assert_close(norm_matched(acts, norm)[0], slow(acts, norm))


def test_the_loss_compares_the_norms():
    torch.manual_seed(0)
    sae = make(afa_coefficient=0.5)
    x = torch.randn(64, 8)
    step = step_input(x)
    step.coefficients = sae.get_coefficients()
    output = sae.training_forward_pass(step)
    gap = (output.feature_acts.norm(dim=1) - x.norm(dim=1)).square().mean()
    torch.testing.assert_close(output.losses["afa_loss"], 0.5 * 8 * gap)
    output.loss.backward()
    assert sae.b_enc.grad is None
    assert sae.W_enc.grad.abs().sum() > 0


def test_the_l0_is_left_to_the_method_unless_requested():
    cfg = TopAFATrainingSAEConfig(d_in=8, d_sae=30)
    assert find_l0_parameter(cfg) == ("found by the method", False)
    assert find_l0_parameter(cfg, "afa") == ("afa", True)
