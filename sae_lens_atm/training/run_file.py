"""Run files: YAML that configures one training run, checked before anything is loaded.

A run file names a SAELens runner and holds the fields of that runner, under SAELens' own names:

    runner: synthetic            # or language_model
    seed: 0
    max_bad_batches: 10          # bad batches in a row at which training stops
    hierarchy_model: {...}       # synthetic only; or synthetic_model, as in SAELens
    activations: {cache: FOLDER} # language_model only: read cached activations
    sae: {architecture: atm, ...}
    ...                          # fields of SyntheticSAERunnerConfig or
                                 # LanguageModelSAERunnerConfig
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunnerConfig

from sae_lens_atm.baselines import training_class, training_names
from sae_lens_atm.data.activation_cache import CacheSettings
from sae_lens_atm.data.synthetic import HierarchyModelConfig
from sae_lens_atm.errors import SettingsError, shown
from sae_lens_atm.sae.config import ATMTrainingSAEConfig
from sae_lens_atm.sae.removed import drop_removed
from sae_lens_atm.training.found_l0 import with_found_k
from sae_lens_atm.training.limits import check_limits, check_sae, check_schedule
from sae_lens_atm.training.schema import build, did_you_mean, schema_of, validate
from sae_lens_atm.yaml_files import apply_overrides, read_yaml

RUNNERS = ("synthetic", "language_model")


@dataclass
class SyntheticRun:
    """A run on synthetic data."""

    runner: SyntheticSAERunnerConfig[Any]
    hierarchy: HierarchyModelConfig | None
    seed: int
    max_bad_batches: int = 10
    """Number of bad batches in a row at which training stops. Others are skipped."""


@dataclass
class LanguageModelRun:
    """A run on the activations of a language model."""

    runner: LanguageModelSAERunnerConfig[Any]
    seed: int
    max_bad_batches: int = 10
    activations: CacheSettings | None = None
    """Cached activations to read in place of the model."""


Run = SyntheticRun | LanguageModelRun


def batch_size_of(run: Run) -> int:
    """Return the number of samples or tokens of a training batch."""
    if isinstance(run, SyntheticRun):
        return run.runner.batch_size
    return run.runner.train_batch_size_tokens


def training_steps(run: Run) -> int:
    """Return the number of training steps.

    SAELens trains until all samples are served: the last batch may go beyond them. Its
    `total_training_steps`, which sets the schedules, leaves that batch out.
    """
    is_synthetic = isinstance(run, SyntheticRun)
    samples = run.runner.training_samples if is_synthetic else run.runner.training_tokens
    return math.ceil(samples / batch_size_of(run))


# --- reading -------------------------------------------------------------------------------------


def load_run(path: str | Path, overrides: Iterable[str] = ()) -> Run:
    """Read a run file, apply overrides of the form `key.subkey=value`, and check everything.

    Raises:
        SettingsError: one line for each mistake.
    """
    return parse_run(apply_overrides(read_yaml(path), overrides), f"runs/{Path(path).stem}")


# --- checking ------------------------------------------------------------------------------------


def parse_run(content: dict[str, Any], default_output: str = "runs/run") -> Run:
    """Check the content of a run file, and make the run.

    Args:
        content: the mapping in the file.
        default_output: `output_path`, if the file has none.

    Raises:
        SettingsError: one line for each mistake.
    """
    if "sweep" in content:
        raise SettingsError("sweep: this is a sweep, use `sae-lens-atm sweep`")
    if "architectures" in content:
        raise SettingsError("architectures: this is a comparison, use `sae-lens-atm compare`")
    runner = content.get("runner")
    if runner not in RUNNERS:
        raise SettingsError(f"runner must be one of {', '.join(RUNNERS)}, got {shown(runner)}")
    content = with_found_k(content, str(content.get("output_path") or default_output))
    sae = _parse_sae(content.get("sae"))
    fields = {key: value for key, value in content.items() if key not in ("runner", "sae")}
    values = validate(_schemas()[runner], fields)
    check_limits({**values, "sae": sae.to_dict()})
    check_sae(sae)
    seed, max_bad_batches = values.pop("seed", 0), values.pop("max_bad_batches", 10)
    # SAELens logs to wandb by default, which needs an account.
    logging: dict[str, Any] = {"log_to_wandb": False, **values.pop("logger", {})}
    values |= {"sae": sae, "logger": LoggingConfig(**logging)}
    output = values.setdefault("output_path", default_output)
    if not output:
        raise SettingsError(f"output_path must be a folder, got {output!r}")
    output = values["output_path"] = str(Path(output).expanduser())
    checkpoints = values.pop("checkpoint_path", None) or f"{output}/checkpoints"
    if runner == "synthetic":
        run = _synthetic_run(values, checkpoints, seed, max_bad_batches)
    else:
        run = _language_model_run(values, checkpoints, seed, max_bad_batches)
    cfg = run.runner
    check_schedule(cfg)
    if hasattr(sae, "schedule_steps") and "schedule_steps" not in content["sae"]:
        sae.schedule_steps = cfg.total_training_steps
    return run


def _language_model_run(
    values: dict[str, Any], checkpoints: str, seed: int, max_bad_batches: int
) -> LanguageModelRun:
    cached = values.pop("activations", None)
    settings = None if cached is None else build(CacheSettings, "activations", **cached)
    values.setdefault("verbose", False)
    values.setdefault("dataset_trust_remote_code", False)
    # SAELens appends a random folder to a checkpoint_path that it gets here.
    cfg = build(LanguageModelSAERunnerConfig, seed=seed, checkpoint_path=None, **values)
    cfg.checkpoint_path = checkpoints
    return LanguageModelRun(cfg, seed, max_bad_batches, settings)


def _synthetic_run(
    values: dict[str, Any], checkpoints: str, seed: int, max_bad_batches: int
) -> SyntheticRun:
    hierarchy_values = values.pop("hierarchy_model", None)
    model_values = values.pop("synthetic_model", None)
    if (hierarchy_values is None) == (model_values is None):
        raise SettingsError("set either hierarchy_model or synthetic_model, and not both")
    hierarchy = None
    if hierarchy_values is not None:
        hierarchy = build(HierarchyModelConfig, "hierarchy_model", **hierarchy_values)
        model: Any = SyntheticModelConfig(hierarchy.num_features, hierarchy.hidden_dim)
    elif isinstance(model_values, str):
        model = model_values
    else:
        # from_dict requires this one nested config; the value is SAELens' default.
        model_values.setdefault("firing_probability", {"generator_name": "zipfian"})
        model = build(SyntheticModelConfig.from_dict, "synthetic_model", d=model_values)
    d_in = values["sae"].d_in
    if isinstance(model, SyntheticModelConfig) and d_in != model.hidden_dim:
        raise SettingsError(
            f"sae.d_in must be {model.hidden_dim}, the hidden_dim of the synthetic model, "
            f"got {d_in}"
        )
    cfg = build(
        SyntheticSAERunnerConfig, synthetic_model=model, checkpoint_path=checkpoints, **values
    )
    return SyntheticRun(cfg, hierarchy, seed, max_bad_batches)


def _parse_sae(content: Any) -> Any:
    if not isinstance(content, dict):
        raise SettingsError(f"sae must be a mapping with an architecture, got {shown(content)}")
    values = cast(dict[str, Any], content)
    architecture = values.get("architecture")
    registered = training_class(architecture) if isinstance(architecture, str) else None
    if registered is None:
        names, got = training_names(), shown(architecture)
        raise SettingsError(
            f"sae.architecture must be one of {', '.join(names)}, got {got}"
            + did_you_mean(got, names)
        )
    config_class = registered[1]
    values = {key: value for key, value in values.items() if key != "architecture"}
    if issubclass(config_class, ATMTrainingSAEConfig):
        values = without_removed(values, "sae.")
    return build(config_class, "sae", **validate(schema_of(config_class), values, "sae"))


def without_removed(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the fields of an ATM config without those of version 0.1 that were removed.

    Raises:
        SettingsError: a removed field has a value that is no longer implemented.
    """
    try:
        return drop_removed(values, where)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _schemas() -> dict[str, type[BaseModel]]:
    logger = schema_of(LoggingConfig)
    common = {"logger": (logger, {}), "seed": (int, 0), "max_bad_batches": (int, 10)}
    return {
        "language_model": schema_of(
            LanguageModelSAERunnerConfig,
            # `--resume` replaces the first of the last two. SAELens does not use the second.
            without={"sae", "logger", "resume_from_checkpoint", "hook_eval"},
            extra={**common, "activations": (schema_of(CacheSettings) | None, None)},
        ),
        "synthetic": schema_of(
            SyntheticSAERunnerConfig,
            without={"sae", "logger", "synthetic_model"},
            extra={
                **common,
                "hierarchy_model": (schema_of(HierarchyModelConfig) | None, None),
                "synthetic_model": (schema_of(SyntheticModelConfig) | str | None, None),
            },
        ),
    }
