import pytest
from sae_lens import TrainingSAEConfig

from sae_lens_atm.compare.plan.l0_target import L0Parameter, find_l0_parameter, is_matched
from sae_lens_atm.errors import SettingsError


def config(architecture, **fields):
    shape = {"architecture": architecture, "d_in": 8, "d_sae": 16}
    return TrainingSAEConfig.from_dict({**shape, **fields})


@pytest.mark.parametrize(
    ("architecture", "fields", "l0_parameter"),
    [
        ("topk", {"k": 2}, L0Parameter("k", False)),
        ("batchtopk", {"k": 2}, L0Parameter("k", False)),
        ("matryoshka_batchtopk", {"k": 2, "matryoshka_widths": [4, 16]}, L0Parameter("k", False)),
        ("abstopk", {"k": 2}, L0Parameter("k", False)),
        ("matching_pursuit", {"decoder_init_norm": 1.0}, L0Parameter("max_iterations", False)),
        ("standard", {}, L0Parameter("l1", True)),
        ("gated", {}, L0Parameter("l1", True)),
        ("jumprelu", {}, L0Parameter("l0", True)),
        ("atm", {"k": 2}, L0Parameter("k", False)),
        ("atm", {"k": 2, "activation": "relu"}, L0Parameter("l1", True)),
    ],
)
def test_the_parameter_that_sets_the_l0(architecture, fields, l0_parameter):
    assert find_l0_parameter(config(architecture, **fields)) == l0_parameter


def test_a_requested_parameter_comes_first():
    cfg = config("matching_pursuit", decoder_init_norm=1.0)
    assert find_l0_parameter(cfg, "residual_threshold") == L0Parameter("residual_threshold", True)
    assert find_l0_parameter(cfg, "max_iterations") == L0Parameter("max_iterations", False)
    quadratic = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 3.0}
    assert find_l0_parameter(config("jumprelu", **quadratic), "target_l0") == L0Parameter(
        "target_l0", False
    )
    with pytest.raises(
        SettingsError, match=r"l0_parameter is 'x'.*max_iterations.*residual_threshold"
    ):
        find_l0_parameter(cfg, "x")


@pytest.mark.parametrize(
    ("l0", "matched"), [(4.19, True), (3.81, True), (4.21, False), (3.79, False)]
)
def test_five_percent(l0, matched):
    assert is_matched(l0, 4) is matched
    assert not is_matched(None, 4)
