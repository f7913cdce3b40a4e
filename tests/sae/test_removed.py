import pytest
from sae_lens import TrainingSAEConfig

from sae_lens_atm import ATMTrainingSAEConfig
from sae_lens_atm.sae.removed import REMOVED, drop_removed

OTHER_VALUES = {
    "schedule": "interleaved",
    "masked_probability": 0.3,
    "mask_granularity": "sample",
    "mask_draw": "coherent",
    "masked_choice": "inherited",
    "k_start": 2.0,
    "importance_combine": "geometric",
    "c_course": "uniform",
    "mask_ramp_steps": 10,
}


def test_every_removed_field_is_tested():
    assert OTHER_VALUES.keys() == REMOVED.keys()


@pytest.mark.parametrize(("name", "value"), OTHER_VALUES.items())
def test_a_removed_field_is_refused_with_one_line(name, value):
    with pytest.raises(ValueError, match=rf"^sae\.{name} is .*removed in 0\.2, ") as caught:
        drop_removed({name: value}, "sae.")
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=name):
        ATMTrainingSAEConfig.from_dict({"d_in": 8, "d_sae": 16, "k": 2, name: value})


def test_the_remaining_values_are_dropped_without_a_word():
    values = {name: removed.remaining for name, removed in REMOVED.items()}
    assert drop_removed({**values, "k": 3}) == {"k": 3}


def test_the_removed_activation_names_its_replacement():
    with pytest.raises(ValueError, match=r"activation is 'jumprelu'.*'batchtopk'"):
        drop_removed({"activation": "jumprelu"})


def test_a_configuration_of_version_0_1_is_read():
    fields = {"architecture": "atm", "d_in": 8, "d_sae": 16, "k": 2, "l0_coefficient": 1.0}
    fields |= {name: removed.remaining for name, removed in REMOVED.items()}
    cfg = TrainingSAEConfig.from_dict(fields)
    assert isinstance(cfg, ATMTrainingSAEConfig)
    assert cfg.k == 2
