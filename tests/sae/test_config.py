import pytest
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TrainingSAEConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args

from sae_lens_atm import ATMTrainingSAEConfig

BAD = {
    "activation": "gelu",
    "masked_weight": 1.5,
    "importance_decay": 1.0,
    "magnitude_weight": -1.0,
    "frequency_weight": float("nan"),
    "contribution_weight": float("inf"),
    "c_start": float("inf"),
    "c_end": "high",
    "schedule_steps": -1,
    "mask_rate": -2.0,
    "mask_warm_up_steps": 1.5,
    "mask_seed": 0.5,
    "k": "5",
    "per_sample_end": 1.0,
    "d_in": 0,
    "d_sae": 10**12,
    "l1_coefficient": -1.0,
    "aux_loss_coefficient": -1.0,
    "topk_threshold_lr": 2.0,
    "lp_norm": -1.0,
    "dtype": "float12",
    "device": "warp9",
    "normalize_activations": "layer_norm",
}


@pytest.mark.parametrize(("field", "value"), BAD.items())
def test_an_error_names_field_value_and_what_is_allowed(field, value):
    with pytest.raises(ValueError, match=field) as caught:
        ATMTrainingSAEConfig(**{"d_in": 8, "d_sae": 200, field: value})
    message = str(caught.value)
    assert repr(value) in message
    assert message.startswith(f"{field} must be ")
    assert "\n" not in message


def test_all_weights_zero_is_an_error():
    weights = dict.fromkeys(("magnitude_weight", "frequency_weight", "contribution_weight"), 0.0)
    with pytest.raises(ValueError, match="contribution_weight are all 0"):
        ATMTrainingSAEConfig(d_in=8, d_sae=200, **weights)


def test_k_is_checked_only_where_it_applies():
    ATMTrainingSAEConfig(d_in=8, d_sae=16, activation="relu")
    with pytest.raises(ValueError, match=r"k must be .*got 100"):
        ATMTrainingSAEConfig(d_in=8, d_sae=16)


def test_paper_preset_is_the_literal_reading_and_can_be_overridden():
    cfg = ATMTrainingSAEConfig.paper(8, 16, l1_coefficient=3.0, mask_rate=2.0)
    assert (cfg.activation, cfg.masked_weight, cfg.parent_weight) == ("relu", 1, 0)
    assert cfg.c_start == cfg.c_end
    assert (cfg.l1_coefficient, cfg.mask_rate) == (3.0, 2.0)


def test_dictionary_round_trip():
    cfg = ATMTrainingSAEConfig(d_in=8, d_sae=32, k=4, masked_weight=0.3, c_start=-0.5)
    again = TrainingSAEConfig.from_dict(cfg.to_dict())
    assert isinstance(again, ATMTrainingSAEConfig)
    assert again.to_dict() == cfg.to_dict()


def test_an_unknown_field_is_an_error():
    cfg = ATMTrainingSAEConfig(d_in=8, d_sae=32, k=4).to_dict()
    with pytest.raises(ValueError, match=r"^mask_rat: unknown field"):
        ATMTrainingSAEConfig.from_dict({**cfg, "mask_rat": 2.0})


def test_fields_that_version_0_1_inherited_are_ignored():
    cfg = ATMTrainingSAEConfig(d_in=8, d_sae=32, k=4).to_dict()
    inherited = {"jumprelu_bandwidth": 0.05, "l0_coefficient": 1.0, "target_l0": None}
    assert ATMTrainingSAEConfig.from_dict({**cfg, **inherited}).to_dict() == cfg


def test_provenance_goes_into_the_metadata():
    metadata = ATMTrainingSAEConfig(d_in=8, d_sae=32, k=4, mask_rate=2.0).metadata
    assert metadata.training_architecture == "atm"
    assert metadata.training_architecture_details["mask_rate"] == 2.0


def test_every_field_is_a_flag_of_saelens_command_line():
    flags = ["--architecture", "atm", "--d_in", "8", "--d_sae", "64", "--dataset_path", "x"]
    flags += ["--kernels", "dense", "--parent_weight", "0.25", "--c_start", "-0.5"]
    flags += ["--activation", "relu", "--l1_coefficient", "2.5", "--mask_seed", "3"]
    flags += ["--masked_weight", "0.1", "--importance_decay", "0.9", "--magnitude_weight", "2"]
    flags += ["--frequency_weight", "0", "--contribution_weight", "4", "--c_end", "2"]
    flags += ["--schedule_steps", "7", "--mask_rate", "3", "--mask_warm_up_steps", "5"]
    sae = _parse_cfg_args(flags).sae
    assert isinstance(sae, ATMTrainingSAEConfig)
    expected = ATMTrainingSAEConfig(
        d_in=8,
        d_sae=64,
        kernels="dense",
        parent_weight=0.25,
        c_start=-0.5,
        activation="relu",
        l1_coefficient=2.5,
        mask_seed=3,
        masked_weight=0.1,
        importance_decay=0.9,
        magnitude_weight=2,
        frequency_weight=0,
        contribution_weight=4,
        c_end=2,
        schedule_steps=7,
        mask_rate=3,
        mask_warm_up_steps=5,
    )
    assert sae.to_dict() == expected.to_dict()


def test_runner_config_round_trip():
    cfg = LanguageModelSAERunnerConfig(
        sae=ATMTrainingSAEConfig(d_in=8, d_sae=32, k=4),
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    again = LanguageModelSAERunnerConfig.from_dict(cfg.to_dict())
    assert again.sae.to_dict() == cfg.sae.to_dict()
