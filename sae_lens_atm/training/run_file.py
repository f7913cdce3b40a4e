"""Run configurations: YAML, checked to the last key before anything is loaded.

A run file says which SAELens runner it is for and then holds that runner's own fields:

    runner: synthetic            # or language_model
    seed: 0
    max_bad_batches: 10          # in a row, at which a run stops; fewer are skipped
    hierarchy_model: {...}       # synthetic only, or synthetic_model, as in SAELens
    sae: {architecture: atm, ...}
    ...                          # the fields of SyntheticSAERunnerConfig or
                                 # LanguageModelSAERunnerConfig, under their own names

The schemas are made from SAELens' dataclasses, so a field that SAELens gains is valid here at once.
"""

import difflib
import reprlib
import types
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import ErrorDetails
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.synthetic import (
    SyntheticModelConfig,
    SyntheticSAERunnerConfig,
)

from sae_lens_atm.data.synthetic import HierarchyModelConfig
from sae_lens_atm.errors import SettingsError
from sae_lens_atm.sae.config import ATMTrainingSAEConfig

RUNNERS = ("synthetic", "language_model")
_LR_SCHEDULERS = ("constant", "cosineannealing", "cosineannealingwarmrestarts")
_POSITIVE = (
    "training_samples",
    "training_tokens",
    "batch_size",
    "train_batch_size_tokens",
    "store_batch_size_prompts",
    "n_batches_in_buffer",
    "context_size",
    "feature_sampling_window",
    "dead_feature_window",
    "n_batches_for_norm_estimate",
    "max_bad_batches",
    "lr",
)


_MOST_SHOWN = 300
_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxlist, _repr.maxdict, _repr.maxtuple = 4, 8, 8, 8
_repr.maxstring = _repr.maxother = _repr.maxlong = _MOST_SHOWN


@dataclass
class SyntheticRun:
    """A run on synthetic data, ready to start."""

    runner: SyntheticSAERunnerConfig[Any]
    hierarchy: HierarchyModelConfig | None
    seed: int
    max_bad_batches: int = 10
    """Batches with NaN, Inf or enormous values are skipped, but so many in a row stop the run."""


@dataclass
class LanguageModelRun:
    """A run on the activations of a language model, ready to start."""

    runner: LanguageModelSAERunnerConfig[Any]
    seed: int
    max_bad_batches: int = 10


Run = SyntheticRun | LanguageModelRun
_Config = TypeVar("_Config")


def load_run(path: str | Path, overrides: Iterable[str] = ()) -> Run:
    """Read a run file, apply `key.subkey=value` overrides, check everything.

    Raises:
        SettingsError: with one line for each thing that is wrong.
    """
    return parse_run(apply_overrides(read_yaml(path), overrides), f"runs/{Path(path).stem}")


def shipped_config(name: str) -> Path:
    """The run file of a name in `configs/`, which comes with the package.

    Raises:
        SettingsError: there is none of that name.
    """
    package = Path(__file__).parent.parent
    # In the wheel configs/ is inside the package, in a checkout beside it.
    folders = (package / "configs", package.parent / "configs")
    names = {file.stem: file for folder in folders for file in folder.glob("*.yaml")}
    if name not in names:
        raise SettingsError(
            f"no run file {name!r}: allowed is a path or one of {', '.join(sorted(names))}"
        )
    return names[name]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # PyYAML lets through what its constructors stumble on
        reason = _one_line(error) or type(error).__name__
        raise SettingsError(f"{path} is not YAML: {reason}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} holds {type(content).__name__}: allowed is a mapping of keys")
    return cast(dict[str, Any], content)


def apply_overrides(content: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Set `key.subkey=value` pairs, the values read as YAML, in a copy."""
    result: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise SettingsError(f"--set {override!r}: allowed is key=value or key.subkey=value")
        *parents, key = path.split(".")
        target = result
        for parent in parents:
            inner = target.get(parent)
            target[parent] = dict(inner) if isinstance(inner, dict) else {}
            target = target[parent]
        try:
            target[key] = yaml.safe_load(text)
        except Exception as error:  # see `read_yaml`
            raise SettingsError(f"--set {shown(override)}: the value is not YAML") from error
    return result


def parse_run(content: dict[str, Any], default_output: str = "runs/run") -> Run:
    """Check the content of a run file and make the run."""
    if "architectures" in content:
        raise SettingsError("architectures: this is a comparison, for `sae-lens-atm compare`")
    if "sweep" in content:
        raise SettingsError("sweep: this is for `sae-lens-atm sweep`")
    runner = content.get("runner")
    if runner not in RUNNERS:
        raise SettingsError(f"runner is {shown(runner)}: allowed is one of {', '.join(RUNNERS)}")
    sae = _parse_sae(content.get("sae"))
    schema = _schemas()[runner]
    values = _validate(schema, {k: v for k, v in content.items() if k not in ("runner", "sae")})
    seed = values.pop("seed", 0)
    _check_common(values)
    max_bad_batches = values.pop("max_bad_batches", 10)
    # Nothing here needs an account: wandb is on when a run file says so.
    logging: dict[str, Any] = {"log_to_wandb": False, **values.pop("logger", {})}
    logger = LoggingConfig(**logging)
    output = values.setdefault("output_path", default_output)
    if not output:
        raise SettingsError(
            f"output_path is {output!r}: allowed is a folder, where the run is kept"
        )
    output = values["output_path"] = str(Path(output).expanduser())
    checkpoints = values.pop("checkpoint_path", None) or f"{output}/checkpoints"
    if runner == "language_model":
        values.setdefault("verbose", False)
        values.setdefault("dataset_trust_remote_code", False)
        # SAELens appends a random folder to a checkpoint_path that it is given at this point.
        cfg = _build(
            LanguageModelSAERunnerConfig,
            sae=sae,
            logger=logger,
            seed=seed,
            checkpoint_path=None,
            **values,
        )
        cfg.checkpoint_path = checkpoints
        _lay_out_schedule(cfg, content)
        return LanguageModelRun(cfg, seed, max_bad_batches)

    hierarchy_values = values.pop("hierarchy_model", None)
    model_values = values.pop("synthetic_model", None)
    if (hierarchy_values is None) == (model_values is None):
        raise SettingsError("one of hierarchy_model and synthetic_model must be given, not both")
    hierarchy = None
    if hierarchy_values is not None:
        hierarchy = _build(HierarchyModelConfig, "hierarchy_model", **hierarchy_values)
        model: Any = SyntheticModelConfig(hierarchy.num_features, hierarchy.hidden_dim)
    elif isinstance(model_values, str):
        model = model_values
    else:
        # The one nested config that from_dict insists on; this is SAELens' default.
        model_values.setdefault("firing_probability", {"generator_name": "zipfian"})
        model = _build(SyntheticModelConfig.from_dict, "synthetic_model", d=model_values)
    if isinstance(model, SyntheticModelConfig) and sae.d_in != model.hidden_dim:
        raise SettingsError(
            f"sae.d_in is {sae.d_in}: allowed is {model.hidden_dim}, the hidden_dim of the "
            "synthetic model"
        )
    cfg = _build(
        SyntheticSAERunnerConfig,
        synthetic_model=model,
        sae=sae,
        logger=logger,
        checkpoint_path=checkpoints,
        **values,
    )
    _lay_out_schedule(cfg, content)
    return SyntheticRun(cfg, hierarchy, seed, max_bad_batches)


def _lay_out_schedule(cfg: Any, content: dict[str, Any]) -> None:
    """Tell ATM how long training is, where the run file does not."""
    if isinstance(cfg.sae, ATMTrainingSAEConfig) and "schedule_steps" not in content["sae"]:
        cfg.sae.schedule_steps = cfg.total_training_steps


def _check_common(values: dict[str, Any]) -> None:
    """What SAELens' runner configs take without a word and stumble on later."""
    for name in _POSITIVE:
        value = values.get(name)
        if value is not None and not value > 0:
            raise SettingsError(f"{name} is {value!r}: allowed is more than 0")
    scheduler = values.get("lr_scheduler_name", "constant")
    if scheduler not in _LR_SCHEDULERS:
        raise SettingsError(
            f"lr_scheduler_name is {scheduler!r}: allowed is one of {', '.join(_LR_SCHEDULERS)}"
            + did_you_mean(scheduler, _LR_SCHEDULERS)
        )
    for name in ("device", "llm_device", "act_store_device"):
        value = values.get(name)
        try:
            torch.device(value or "cpu")
        except RuntimeError as error:
            raise SettingsError(f"{name} is {value!r}: allowed is a device of torch") from error


def _parse_sae(content: Any) -> Any:
    if not isinstance(content, dict):
        raise SettingsError(f"sae is {shown(content)}: allowed is a mapping with an architecture")
    values = cast(dict[str, Any], content)
    architecture = values.get("architecture")
    if not isinstance(architecture, str) or architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise SettingsError(
            f"sae.architecture is {shown(architecture)}: allowed is one of "
            f"{', '.join(sorted(SAE_TRAINING_CLASS_REGISTRY))}"
            + did_you_mean(shown(architecture), SAE_TRAINING_CLASS_REGISTRY)
        )
    config_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    checked = _validate(
        _schema(config_class), {k: v for k, v in values.items() if k != "architecture"}, "sae"
    )
    return _build(config_class, "sae", **checked)


def parse_fields(cls: type[_Config], values: dict[str, Any], where: str) -> _Config:
    """A config dataclass from the mapping of its fields in a YAML file, checked."""
    return _build(cls, where, **_validate(_schema(cls), values, where))


def _schemas() -> dict[str, type[BaseModel]]:
    logger = _schema(LoggingConfig)
    return {
        "language_model": _schema(
            LanguageModelSAERunnerConfig,
            # `--resume` and the training of one SAE from a run file make these moot.
            without={"sae", "logger", "resume_from_checkpoint", "hook_eval"},
            extra={"logger": (logger, {}), "seed": (int, 0), "max_bad_batches": (int, 10)},
        ),
        "synthetic": _schema(
            SyntheticSAERunnerConfig,
            without={"sae", "logger", "synthetic_model"},
            extra={
                "logger": (logger, {}),
                "seed": (int, 0),
                "max_bad_batches": (int, 10),
                "hierarchy_model": (_schema(HierarchyModelConfig) | None, None),
                "synthetic_model": (_schema(SyntheticModelConfig) | str | None, None),
            },
        ),
    }


def _schema(
    cls: type, without: Iterable[str] = (), extra: dict[str, tuple[Any, Any]] | None = None
) -> type[BaseModel]:
    """A pydantic model with the fields of a dataclass, that forbids all others."""
    hints = get_type_hints(cls)
    skipped = {"metadata", *without}
    spec: dict[str, Any] = {}
    for field in fields(cls):
        if field.name not in skipped:
            required = field.default is MISSING and field.default_factory is MISSING
            spec[field.name] = (_schema_of_hint(hints[field.name]), ... if required else None)
    config = ConfigDict(extra="forbid", protected_namespaces=())
    return cast(Any, create_model)(cls.__name__, __config__=config, **{**spec, **(extra or {})})


def _schema_of_hint(hint: Any) -> Any:
    """The hint with dataclasses replaced by their schemas, and abstract ones by dictionaries."""
    if is_dataclass(hint) and isinstance(hint, type):
        return dict[str, Any] if getattr(hint, "__abstractmethods__", None) else _schema(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(_schema_of_hint(part) for part in get_args(hint))]  # noqa: UP007
    return hint


def _validate(schema: type[BaseModel], values: dict[str, Any], where: str = "") -> dict[str, Any]:
    try:
        return schema.model_validate(values).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise SettingsError("\n".join(describe_errors(error, values, schema, where))) from error


def describe_errors(
    error: ValidationError, values: Any, schema: type[BaseModel], where: str = ""
) -> list[str]:
    """One line for each thing that is wrong: the key, the value, what is allowed."""
    # A value that fits no member of a union gives an error for each: one is enough, and the
    # deepest says most.
    located = [(_location(e, values), e) for e in error.errors()]
    deepest = {
        key: e
        for key, e in reversed(located)
        if not any(len(other) > len(key) and other[: len(key)] == key for other, _ in located)
    }
    return [_describe(e, key, schema, where) for key, e in reversed(deepest.items())]


def _location(error: ErrorDetails, values: Any) -> tuple[str, ...]:
    """The keys that lead to an error, without the names of union members among them."""
    keys: list[str] = []
    for part in error["loc"]:
        if isinstance(values, dict) and part in values:
            keys.append(str(part))
            values = cast(dict[Any, Any], values)[part]
    if error["type"] == "missing":
        keys.append(str(error["loc"][-1]))
    return tuple(keys)


def _describe(
    error: ErrorDetails, location: tuple[str, ...], schema: type[BaseModel], where: str
) -> str:
    key = ".".join([where, *location] if where else location)
    if error["type"] == "extra_forbidden":
        names = _names_at(schema, location[:-1])
        return f"{key}: unknown key{did_you_mean(location[-1], names)}"
    if error["type"] == "missing":
        return f"{key}: missing, and has no default"
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key} is {shown(error['input'])}: {message}"


def _names_at(schema: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    for part in path:
        if part not in schema.model_fields:  # a key of a dictionary, whose values have a schema
            continue
        annotation = schema.model_fields[part].annotation
        options = [annotation, *get_args(annotation)]
        models = (o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
        schema = next(models, schema)
    return list(schema.model_fields)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def _build(cls: Any, where: str = "", **values: Any) -> Any:
    """Make a config, its own complaints turned into ours."""
    try:
        return cls(**values)
    except (ValueError, TypeError, KeyError) as error:
        message = f"missing key {error}" if isinstance(error, KeyError) else _one_line(error)
        # Our own configs' messages start with the field, the others' with whatever they like.
        named = any(message.split(verb)[0].isidentifier() for verb in (" must be ", " is "))
        joint = "." if named else ": "
        raise SettingsError(f"{where}{joint}{message}" if where else message) from error


def shown(value: object) -> str:
    """A value as it is written in a message, which a file must not make endless."""
    try:
        text = _repr.repr(value)
    except ValueError as error:  # of a number of thousands of digits
        text = str(error)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[: 10 * _MOST_SHOWN]
