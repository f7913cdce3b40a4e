"""A sweep as wandb's: a sweep file, and the run file that its agents train with other settings.

    wandb sweep FOLDER/sweep.yaml       # wandb tells an id
    wandb agent ID                      # here and elsewhere, from the folder of this command

Each of wandb's runs is one of `sae-lens-atm train`: on batches drawn anew, and evaluated as such a
run is. In a random search wandb draws the seed and the L0 too, where there are several.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from sae_lens_atm.compare.plan.comparison_file import OWN_KEYS, Comparison, is_comparison
from sae_lens_atm.compare.plan.sweep_file import Range, as_comparison, parse_sweep
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.files import write_text

RUN_FILE, SWEEP_FILE = "run.yaml", "sweep.yaml"
# wandb names the run in the environment of the command, not on its line.
_TRAIN = 'exec sae-lens-atm train "$0" "output_path=$1/$WANDB_RUN_ID" "${@:2}"'


def write_wandb_sweep(comparison: Comparison, folder: Path) -> list[Path]:
    """Write both files.

    Raises:
        SettingsError: there are several architectures, which one sweep of wandb's is not for.
    """
    run, parameters = run_and_parameters(comparison)
    sweep, _ = parse_sweep(comparison.content)
    runs_a_point = len({(planned.seed, planned.l0) for planned in comparison.planned})
    file: dict[str, Any] = {
        "name": comparison.name,
        "method": "grid" if sweep.points is None else "random",
        "metric": {"name": "metrics/explained_variance", "goal": "maximize"},
        "parameters": parameters,
        "command": [
            "bash",
            "-c",
            _TRAIN,
            str(folder / RUN_FILE),
            str(comparison.output),
            "${args_no_hyphens}",
        ],
    }
    if sweep.points is not None:
        file["run_cap"] = sweep.points * runs_a_point
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_text(folder / name, yaml.safe_dump(content, sort_keys=False))
        for name, content in ((RUN_FILE, run), (SWEEP_FILE, file))
    ]


def run_and_parameters(comparison: Comparison) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run file, and what wandb is to vary in it."""
    content = {key: value for key, value in comparison.content.items() if key != "sweep"}
    if not is_comparison(content):
        content = as_comparison(content)
    if len(content["architectures"]) != 1:
        raise SettingsError("--wandb: allowed is a sweep of one architecture")
    if "spelling_lm" in content:
        raise SettingsError("--wandb: spelling_lm is for `sae-lens-atm sweep`; see make-lm")
    ((name, entry),) = content["architectures"].items()
    knob = comparison.planned[0].knob
    if knob.steered:
        raise SettingsError(
            f"--wandb: {knob.name} of {name!r} is steered to the L0, which wandb's runs are not"
        )
    entry = entry or {}
    sae = comparison.planned[0].run.runner.sae
    known = {field.name for field in fields(sae)}
    shared = {key: value for key, value in (content.get("sae") or {}).items() if key in known}
    run = {k: v for k, v in content.items() if k not in (*OWN_KEYS, "output_path", "sae")}
    run |= entry.get("run") or {}
    run["sae"] = {"architecture": sae.architecture(), **shared, **(entry.get("sae") or {})}
    run["logger"] = {"log_to_wandb": True, **run.get("logger", {})}
    _, axes = parse_sweep(comparison.content)
    seeds = list(dict.fromkeys(planned.seed for planned in comparison.planned))
    several = {f"sae.{knob.name}": content["l0"], "seed": seeds}
    run["sae"][knob.name], run["seed"] = (values[0] for values in several.values())
    several = {key: values for key, values in several.items() if len(values) > 1}
    return run, {key: _parameter(axis) for key, axis in (several | axes).items()}


def _parameter(axis: list[Any] | Range) -> dict[str, Any]:
    """As wandb describes it."""
    if isinstance(axis, list):
        return {"values": axis}
    whole = isinstance(axis.low, int) and isinstance(axis.high, int)
    kinds = {
        (False, False): "uniform",
        (False, True): "log_uniform_values",
        (True, False): "int_uniform",
        (True, True): "q_log_uniform_values",
    }
    return {"distribution": kinds[whole, axis.log], "min": axis.low, "max": axis.high}
