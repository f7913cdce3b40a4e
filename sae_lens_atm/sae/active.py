"""The training settings of an SAE that have an effect, given the other settings."""

from typing import Any

_OF_ACTIVATION = {
    "batchtopk": (
        "k",
        "topk_threshold_lr",
        "aux_loss_coefficient",
        "aux_negative_slope",
        "rescale_acts_by_decoder_norm",
        "use_sparse_activations",
        "per_sample_end",
    ),
    "relu": ("l1_coefficient", "lp_norm", "l1_warm_up_steps"),
}
_OF_MASKS = ("c_start", "c_end", "mask_end", "mask_warm_up_steps", "mask_seed")
_OF_PARENTS = ("parent_tau", "parent_chance", "parent_start", "parent_rows")
_OF_FREQUENCY_PENALTY = ("frequency_penalty_end",)
_OF_BUDGETS = ("budget_end",)
_OF_SCHEDULES = ("schedule_steps",)


def active_settings(details: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that have an effect.

    Settings of the other activation are left out. So are those of masks and of our losses if they
    are off, except for the field that turns them off. Other architectures keep all.

    Args:
        details: ``training_architecture_details`` in the metadata of a saved SAE.
    """
    activation = details.get("activation")
    if activation not in _OF_ACTIVATION or "mask_rate" not in details:
        return details
    inactive = {
        name for other, names in _OF_ACTIVATION.items() if other != activation for name in names
    }
    masks = all(details.get(name, 1) > 0 for name in ("mask_rate", "masked_weight", "mask_end"))
    parents = details.get("parent_weight", 0) > 0
    if not masks:
        inactive.update(_OF_MASKS)
    if not parents:
        inactive.update(_OF_PARENTS)
    penalty = details.get("frequency_penalty", 0) > 0
    if not penalty:
        inactive.update(_OF_FREQUENCY_PENALTY)
    budgets = details.get("budget_weight", 0) > 0
    if not budgets:
        inactive.update(_OF_BUDGETS)
    per_sample = activation == "batchtopk" and details.get("per_sample_end", 0) > 0
    if not (masks or parents or penalty or budgets or per_sample):
        inactive.update(_OF_SCHEDULES)
    return {name: value for name, value in details.items() if name not in inactive}
