from sae_lens_atm import ATMTrainingSAEConfig
from sae_lens_atm.sae import active
from sae_lens_atm.sae.active import active_settings


def details(**overrides):
    cfg = ATMTrainingSAEConfig(d_in=8, d_sae=32, k=2, **overrides)
    return cfg.to_dict()["metadata"]["training_architecture_details"]


def left_out(**overrides):
    given = details(**overrides)
    return set(given) - set(active_settings(given))


def test_settings_of_the_other_activation_are_left_out():
    of_relu = {"l1_coefficient", "lp_norm", "l1_warm_up_steps"}
    assert left_out(frequency_penalty=0.1, budget_weight=0.1) == of_relu
    assert {"k", "aux_loss_coefficient"} <= left_out(activation="relu")


def test_settings_of_what_is_off_are_left_out():
    losses = {"frequency_penalty": 0.1, "budget_weight": 0.1}
    with_all = left_out(**losses)
    masks = left_out(mask_rate=0.0, **losses) - with_all
    parents = left_out(parent_weight=0.0, **losses) - with_all
    penalty = left_out(budget_weight=0.1) - with_all
    budgets = left_out(frequency_penalty=0.1) - with_all
    assert masks == {"c_start", "c_end", "mask_end", "mask_warm_up_steps", "mask_seed"}
    assert parents == {"parent_tau", "parent_chance", "parent_start", "parent_rows"}
    assert penalty == {"frequency_penalty_end"}
    assert budgets == {"budget_end"}
    assert "schedule_steps" not in left_out(mask_rate=0.0, parent_weight=0.0, per_sample_end=0.1)
    nothing = left_out(mask_rate=0.0, parent_weight=0.0) - with_all
    assert nothing == masks | parents | penalty | budgets | {"schedule_steps"}


def test_the_fields_that_turn_parts_off_are_shown():
    shown = active_settings(details(mask_rate=0.0, parent_weight=0.0))
    assert shown["mask_rate"] == shown["parent_weight"] == 0


def test_every_name_is_a_field():
    names = [*active._OF_MASKS, *active._OF_PARENTS, *active._OF_SCHEDULES]
    names += [*active._OF_FREQUENCY_PENALTY, *active._OF_BUDGETS]
    names += [name for group in active._OF_ACTIVATION.values() for name in group]
    assert set(names) <= set(details())


def test_other_architectures_keep_all_settings():
    assert active_settings({"k": 3, "lr": 1}) == {"k": 3, "lr": 1}
    assert active_settings({}) == {}
