"""Configuration files: finding them, reading their YAML, and changing single keys.

What the keys mean is no matter here. This module imports neither torch nor SAELens.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import yaml

from sae_lens_atm.errors import SettingsError, one_line, shown


def shipped_config(name: str) -> Path:
    """Return the path of a file in `configs/`, which is part of the package.

    Raises:
        SettingsError: there is no file of that name.
    """
    package = Path(__file__).parent
    # In the wheel configs/ is inside the package, in a checkout beside it.
    folders = (package / "configs", package.parent / "configs")
    names = {file.stem: file for folder in folders for file in folder.glob("*.yaml")}
    if name not in names:
        raise SettingsError(
            f"no run file {name!r}: give a path or one of {', '.join(sorted(names))}"
        )
    return names[name]


_KEYS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class _WrongKey(ValueError):
    """A key that is no text, or that its mapping has twice."""


class _UniqueKeys(yaml.SafeLoader):
    """Loads YAML as `yaml.safe_load` does. Refuses keys that are no text or occur twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag not in _KEYS:
                raise _WrongKey(f"the key in line {line} must be text, put it in quotes")
            if key.value in lines:
                raise _WrongKey(f"{key.value} is set twice, in lines {lines[key.value]} and {line}")
            lines[key.value] = line
        return node


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        SettingsError: the file cannot be read, or holds something else.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except _WrongKey as error:
        raise SettingsError(f"{path}: {error}") from error
    except Exception as error:  # PyYAML's constructors raise errors of many types
        reason = one_line(error) or type(error).__name__
        raise SettingsError(f"{path} is not YAML: {reason}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold a mapping of keys, got {type(content).__name__}")
    return cast(dict[str, Any], content)


def apply_overrides(content: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of a mapping with `key.subkey=value` pairs set. Values are read as YAML.

    Raises:
        SettingsError: an override has another form.
    """
    result: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise SettingsError(f"--set must be key=value or key.subkey=value, got {override!r}")
        *parents, key = path.split(".")
        target = result
        for parent in parents:
            inner = target.get(parent)
            target[parent] = dict(inner) if isinstance(inner, dict) else {}
            target = target[parent]
        try:
            target[key] = yaml.load(text, _UniqueKeys)
        except _WrongKey as error:
            raise SettingsError(f"--set {shown(override)}: {error}") from error
        except Exception as error:  # see `read_yaml`
            raise SettingsError(f"--set {shown(override)}: the value is not YAML") from error
    return result
