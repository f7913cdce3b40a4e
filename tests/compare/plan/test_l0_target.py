import pytest
from sae_lens import TrainingSAEConfig

from sae_lens_atm.compare.plan.l0_target import Knob, find_knob, is_matched
from sae_lens_atm.errors import SettingsError


def config(architecture, **fields):
    shape = {"architecture": architecture, "d_in": 8, "d_sae": 16}
    return TrainingSAEConfig.from_dict({**shape, **fields})


@pytest.mark.parametrize(
    ("architecture", "fields", "knob"),
    [
        ("topk", {"k": 2}, Knob("k", False)),
        ("batchtopk", {"k": 2}, Knob("k", False)),
        ("matryoshka_batchtopk", {"k": 2, "matryoshka_widths": [4, 16]}, Knob("k", False)),
        ("abstopk", {"k": 2}, Knob("k", False)),
        ("matching_pursuit", {"decoder_init_norm": 1.0}, Knob("max_iterations", False)),
        ("standard", {}, Knob("l1", True)),
        ("gated", {}, Knob("l1", True)),
        ("jumprelu", {}, Knob("l0", True)),
        ("atm", {"k": 2}, Knob("k", False)),
        ("atm", {"k": 2, "activation": "relu"}, Knob("l1", True)),
    ],
)
def test_what_sets_the_l0(architecture, fields, knob):
    assert find_knob(config(architecture, **fields)) == knob


def test_what_is_asked_for_comes_first():
    cfg = config("matching_pursuit", decoder_init_norm=1.0)
    assert find_knob(cfg, "residual_threshold") == Knob("residual_threshold", True)
    assert find_knob(cfg, "max_iterations") == Knob("max_iterations", False)
    quadratic = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 3.0}
    assert find_knob(config("jumprelu", **quadratic), "target_l0") == Knob("target_l0", False)
    with pytest.raises(SettingsError, match=r"l0_knob is 'x'.*max_iterations.*residual_threshold"):
        find_knob(cfg, "x")


@pytest.mark.parametrize(
    ("l0", "matched"), [(4.19, True), (3.81, True), (4.21, False), (3.79, False)]
)
def test_five_percent(l0, matched):
    assert is_matched(l0, 4) is matched
    assert not is_matched(None, 4)
