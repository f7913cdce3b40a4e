"""Results as JSON. Runs in either environment."""

import json
from typing import Any


def to_json(results: dict[str, Any]) -> str:
    """Return results of SAEBench as JSON text.

    They hold numbers of numpy and torch, and SAELens' metadata. Anything else becomes text, since
    an error here would lose the work of hours.
    """
    return json.dumps(results, default=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return str(value)
