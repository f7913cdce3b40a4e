"""The runs of any configuration file: of one SAE, of a comparison or of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from sae_lens_atm.compare.plan.comparison_file import is_comparison, parse_comparison
from sae_lens_atm.compare.plan.l0_target import ANY_L0
from sae_lens_atm.compare.plan.sweep_file import load_sweep
from sae_lens_atm.training.run_file import Run, apply_overrides, parse_run, read_yaml


def runs_in(path: str, overrides: Sequence[str] = ()) -> list[Run]:
    """Return the runs of a run, comparison or sweep file.

    Args:
        path: the file.
        overrides: `key.subkey=value` pairs.

    Raises:
        SettingsError: the file is wrong. The message has one line for each mistake.
    """
    content = apply_overrides(read_yaml(path), overrides)
    if "sweep" in content:
        return [p.run for p in load_sweep(path, overrides).planned]
    content = with_any_l0(content)
    if is_comparison(content):
        return [p.run for p in parse_comparison(content, Path(path).stem).planned]
    return [parse_run(content, f"runs/{Path(path).stem}")]


def with_any_l0(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content with a number for `l0: found` or `k: found`, which may not be found yet.

    Data and saved SAEs do not depend on it.
    """
    if is_comparison(content):
        return {**content, "l0": [ANY_L0]} if isinstance(content.get("l0"), str) else content
    sae = content.get("sae")
    if not isinstance(sae, dict) or not isinstance(cast(dict[str, Any], sae).get("k"), str):
        return content
    return {**content, "sae": {**cast(dict[str, Any], sae), "k": ANY_L0}}
