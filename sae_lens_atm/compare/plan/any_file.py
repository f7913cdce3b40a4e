"""The runs of any configuration file: of one SAE, of a comparison or of a sweep."""

from collections.abc import Sequence

from sae_lens_atm.compare.plan.comparison_file import is_comparison, load_comparison
from sae_lens_atm.compare.plan.l0_target import ANY_L0
from sae_lens_atm.compare.plan.sweep_file import load_sweep
from sae_lens_atm.training.run_file import Run, apply_overrides, load_run, read_yaml


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
    if is_comparison(content):
        # Their data do not depend on the L0, which may not have been found yet.
        l0 = [f"l0=[{ANY_L0}]"] if isinstance(content.get("l0"), str) else []
        return [p.run for p in load_comparison(path, [*overrides, *l0]).planned]
    return [load_run(path, overrides)]
