"""Checks of a comparison before it starts."""

import warnings

from sae_lens_atm.compare.plan.comparison_file import Comparison
from sae_lens_atm.compare.run.cached import contexts_to_cache
from sae_lens_atm.compare.run.probing import task_store
from sae_lens_atm.evaluation.contrastive_stories import read_stories
from sae_lens_atm.files import check_writable
from sae_lens_atm.training.preflight.checks import (
    check_data,
    check_dataset_exists,
    has_masks,
    never_masks,
)
from sae_lens_atm.training.preflight.lookups import look_up
from sae_lens_atm.training.run_file import LanguageModelRun

_LOOKED_UP = (
    *("model_name", "model_class_name", "hook_name", "hook_head_index"),
    *("dataset_path", "context_size"),
)
_SHOWN = ("checked", "columns")  # of the facts that `look_up` returns


def check(comparison: Comparison) -> dict[str, str]:
    """Check the output folder, language models and their data, without loading weights.

    Returns:
        What was checked of language models, for a table.

    Raises:
        SettingsError: the folder is not writable, or model, hook or data do not fit the runs.
    """
    folder = comparison.output
    check_writable("output_path", folder)
    for planned in {planned.group: planned for planned in comparison.planned}.values():
        if isinstance(planned.run, LanguageModelRun):
            check_data(planned.run, exists=False)
            has_cache = planned.run.activations is not None
            reads_text = not has_cache or contexts_to_cache(comparison.planned) > 0
            if planned.lm is None and reads_text:
                check_dataset_exists(planned.run.runner)
            if planned.sae_probes is not None:
                task_store(planned, folder)
            read_stories(planned.contrastive_stories)
    facts = look_up_language_models(comparison)
    warn_of_missing_masks(comparison)
    return facts


def look_up_language_models(comparison: Comparison) -> dict[str, str]:
    """Check model, hook, width and dataset of the runs, as `train --dry-run` does.

    A model that the comparison makes itself is not checked. The result
    names what could not be looked up, for example offline.

    Returns:
        What was checked, for the first of the models.

    Raises:
        SettingsError: they do not fit.
    """
    settings: dict[tuple[object, ...], LanguageModelRun] = {}
    for planned in comparison.planned:
        if isinstance(planned.run, LanguageModelRun) and planned.lm is None:
            cfg = planned.run.runner
            settings.setdefault((*(getattr(cfg, n) for n in _LOOKED_UP), cfg.sae.d_in), planned.run)
    found = [look_up(run.runner) for run in settings.values()]
    return {name: found[0][name] for name in _SHOWN if name in found[0]} if found else {}


def warn_of_missing_masks(comparison: Comparison) -> None:
    """Warn of each entry whose masks are on but begin too late to mask a latent.

    A sweep in which this is so for all points gets one warning.
    """
    masked = [p for p in comparison.planned if p.settings.trained and has_masks(p.run)]
    reasons = {p.entry: never_masks(p.run) for p in masked}
    late = [f"{entry}: {reason}" for entry, reason in reasons.items() if reason is not None]
    if comparison.sweep is not None and len(late) == len(reasons) > 1:
        late = [f"all {len(late)} points with masks, for example {late[0]}"]
    for line in late:
        warnings.warn(line, stacklevel=2)
