"""Check the values of a YAML file against the fields of a dataclass.

A pydantic schema is made from the dataclass, so a field that SAELens adds is valid at once. Each
mistake becomes one line: the key, its value, and what is allowed.
"""

import difflib
import math
import re
import types
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model
from pydantic_core import ErrorDetails

from sae_lens_atm.errors import SettingsError, one_line, shown

_Config = TypeVar("_Config")


def parse_fields(cls: type[_Config], values: dict[str, Any], where: str) -> _Config:
    """Make a dataclass from a mapping of its fields.

    Args:
        cls: the dataclass.
        values: the mapping, as read from a file.
        where: the key of the mapping in the file, for messages.

    Raises:
        SettingsError: one line for each mistake.
    """
    return build(cls, where, **validate(schema_of(cls), values, where))


def schema_of(
    cls: type, without: Iterable[str] = (), extra: dict[str, tuple[Any, Any]] | None = None
) -> type[BaseModel]:
    """Make a pydantic schema with the fields of a dataclass, which forbids all other keys.

    Args:
        cls: the dataclass.
        without: fields to leave out. `metadata` is always left out.
        extra: more fields, each with its type and default.
    """
    hints = get_type_hints(cls)
    skipped = {"metadata", *without}
    spec: dict[str, Any] = {}
    for field in fields(cls):
        if field.name not in skipped:
            required = field.default is MISSING and field.default_factory is MISSING
            spec[field.name] = (_schema_of_hint(hints[field.name]), ... if required else None)
    for name, (hint, default) in (extra or {}).items():
        spec[name] = (_schema_of_hint(hint), default)
    config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    return cast(Any, create_model)(cls.__name__, __config__=config, **spec)


def _whole(value: object) -> object:
    """Convert text such as "1e5" to an int. YAML reads such numbers as text."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return value
    return int(number) if number.is_integer() else value


_Whole = Annotated[int, BeforeValidator(_whole)]


def _schema_of_hint(hint: Any) -> Any:
    """Replace dataclasses in a type hint by their schemas, and abstract ones by dictionaries."""
    if hint is int:
        return _Whole
    if is_dataclass(hint) and isinstance(hint, type):
        return dict[str, Any] if getattr(hint, "__abstractmethods__", None) else schema_of(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(_schema_of_hint(part) for part in get_args(hint))]  # noqa: UP007
    return hint


def validate(schema: type[BaseModel], values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Return the values that are set, converted to the types of the schema.

    Raises:
        SettingsError: one line for each mistake.
    """
    try:
        return schema.model_validate(values).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise SettingsError("\n".join(describe_errors(error, values, schema, where))) from error


def build(cls: Any, where: str = "", **values: Any) -> Any:
    """Call a configuration class, and turn its own errors into a `SettingsError`."""
    try:
        return cls(**values)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        message = f"missing key {error}" if isinstance(error, KeyError) else one_line(error)
        # Messages of our own classes start with the field, those of other classes with any text.
        names = {field.name for field in fields(cls)} if is_dataclass(cls) else set[str]()
        joint = "." if message.split(" ", 1)[0] in names else ": "
        raise SettingsError(f"{where}{joint}{message}" if where else message) from error


# --- messages ------------------------------------------------------------------------------------


def describe_errors(
    error: ValidationError, values: Any, schema: type[BaseModel], where: str = ""
) -> list[str]:
    """Return one line for each mistake: the key, its value, what is allowed."""
    # A value that fits no member of a union has one error for each member. The error with the
    # longest key is the most specific.
    located = [(_location(e, values), e) for e in error.errors()]
    deepest = {
        key: e
        for key, e in reversed(located)
        if not any(len(other) > len(key) and other[: len(key)] == key for other, _ in located)
    }
    return [_describe(e, key, schema, where) for key, e in reversed(deepest.items())]


def _location(error: ErrorDetails, values: Any) -> tuple[str, ...]:
    """Return the keys that lead to an error. Pydantic also lists the names of union members."""
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
        return f"{key}: missing, and it has no default"
    got, message = shown(error["input"]), error["msg"]
    if message.startswith("Input should be "):
        allowed = re.split(", unable to |, got ", message.removeprefix("Input should be "))[0]
        return f"{key} must be {allowed}, got {got}"
    return f"{key}: {message[0].lower()}{message[1:]}, got {got}"


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
    """Return the end of a message that suggests the most similar name, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
