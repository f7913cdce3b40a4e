"""The keys that a comparison file has in addition to those of a run file."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from sae_lens_atm.compare.plan.planned_run import EntrySettings
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.metrics.figures import FIGURES
from sae_lens_atm.training.schema import describe_errors

SAME_FOR_ALL = (
    "runner",
    "sae",
    "seed",
    "output_path",
    "checkpoint_path",
    "logger",
    "hierarchy_model",
    "synthetic_model",
    "model_name",
    "model_class_name",
    "dataset_path",
    "activations",
    "is_dataset_tokenized",
    "streaming",
    "hook_name",
    "hook_head_index",
    "context_size",
    "seqpos_slice",
    "prepend_bos",
    "exclude_special_tokens",
    "model_kwargs",
    "model_from_pretrained_kwargs",
    "store_batch_size_prompts",
    "eval_batch_size_prompts",
    "n_eval_batches",
    "eval_samples",
    "eval_frequency",
    "n_checkpoints",
    "max_bad_batches",
    "device",
    "llm_device",
    "act_store_device",
)
"""Run fields that cannot differ between the runs of a comparison: data, evaluation, devices."""


class ComparisonSettings(BaseModel):
    """The values of these keys."""

    model_config = ConfigDict(extra="forbid")
    name: str
    seeds: list[int] = Field(default=[0, 1, 2], min_length=1)
    l0: list[PositiveFloat] = Field(min_length=1)
    architectures: dict[str, EntrySettings] = Field(min_length=1)
    quick: dict[str, Any] = Field(default_factory=dict)
    curve_points: int = Field(default=20, ge=2)
    """Number of points of a run's curves over training."""
    not_ranked: list[str] = Field(default_factory=list)
    """Figures that are reported without a best value, as they mean little on these data."""
    pool_batches: int | None = Field(default=None, ge=1)
    """Synthetic data only: the number of batches that are drawn for a seed. Longer runs repeat
    them. The default draws one batch for each training step."""
    spelling_lm: dict[str, Any] | None = None
    """Fields of `SpellingLMConfig`, with the list `seeds` instead of `seed`. Every SAE is trained
    on each of these models."""
    first_letters: dict[str, Any] | None = None
    """Fields of `FirstLetterConfig`. Without this key absorption is not measured."""
    sae_probes: dict[str, Any] | None = None
    """Fields of `SaeProbesConfig`. Without this key SAEs are not probed on these tasks."""
    contrastive_stories: dict[str, Any] | None = None
    """Fields of `ContrastiveStoriesConfig`. Without this key there is no contrastive score."""


OWN_KEYS = tuple(ComparisonSettings.model_fields)


def check_settings(values: dict[str, Any]) -> ComparisonSettings:
    """Check the keys of a comparison file that a run file does not have.

    Raises:
        SettingsError: with one line for each mistake.
    """
    entries: Any = values.get("architectures")
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and "l0_knob" in entry:
            raise SettingsError(f"architectures.{name}.l0_knob: renamed, use l0_parameter")
    try:
        settings = ComparisonSettings.model_validate(values)
    except ValidationError as error:
        lines = describe_errors(error, values, ComparisonSettings)
        raise SettingsError("\n".join(lines)) from error
    for key, value in (("seeds", settings.seeds), ("l0", settings.l0)):
        if len(set(value)) != len(value):
            raise SettingsError(f"{key} must have each value once, got {value!r}")
    for figure in settings.not_ranked:
        if figure not in FIGURES:
            raise SettingsError(
                f"not_ranked must be a list of figures ({', '.join(FIGURES)}), got {figure!r}"
            )
    return settings
