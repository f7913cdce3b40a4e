"""The data of the page in one compressed text.

The bytes are a header, which is JSON and says where each array lies, and the arrays behind it.
"""

import base64
import gzip
import json
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

_ALIGNED = 8  # typed arrays of JavaScript start at multiples of their item size
_KINDS = {"float32", "uint32", "int32", "uint16", "uint8", "int8"}


def pack(content: Mapping[str, Any]) -> str:
    """Return content as base64 of gzip. Named tuples become objects, and arrays typed arrays.

    Args:
        content: plain values, named tuples, lists, and arrays of the types in `_KINDS`.
    """
    arrays: list[bytes] = []
    place = 0

    def plain(value: Any) -> Any:
        nonlocal place
        if isinstance(value, np.ndarray):
            array = cast(NDArray[Any], value)
            if array.dtype.name not in _KINDS:
                raise TypeError(f"no typed array for {array.dtype.name}")
            raw = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"))).tobytes()
            entry = {"dtype": array.dtype.name, "at": place, "shape": list(array.shape)}
            padding = -len(raw) % _ALIGNED
            arrays.append(raw + bytes(padding))
            place += len(raw) + padding
            return {"array": entry}
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            value = cast(NamedTuple, value)._asdict()
        if isinstance(value, Mapping):
            return {name: plain(part) for name, part in cast(Mapping[str, Any], value).items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in cast(list[Any], value)]
        if isinstance(value, float) and not np.isfinite(value):
            return None
        return value

    header = json.dumps(plain(content), ensure_ascii=False, allow_nan=False).encode()
    header += b" " * (-len(header) % _ALIGNED)
    size = len(header).to_bytes(_ALIGNED, "little")
    return base64.b64encode(gzip.compress(size + header + b"".join(arrays), 6, mtime=0)).decode()


def unpack(text: str) -> dict[str, Any]:
    """Return the content of `pack`, with lists in place of tuples, as the page reads it."""
    raw = gzip.decompress(base64.b64decode(text))
    start = _ALIGNED + int.from_bytes(raw[:_ALIGNED], "little")
    header = json.loads(raw[_ALIGNED:start])

    def restored(value: Any) -> Any:
        if isinstance(value, dict):
            entry = cast(dict[str, Any], value)
            if entry.keys() == {"array"}:
                about = entry["array"]
                dtype = np.dtype(about["dtype"])
                dtype = dtype.newbyteorder("<") if sys.byteorder == "big" else dtype
                count = int(np.prod(about["shape"]))
                flat = np.frombuffer(raw, dtype, count, start + about["at"])
                return flat.reshape(about["shape"])
            return {name: restored(part) for name, part in entry.items()}
        if isinstance(value, list):
            return [restored(part) for part in cast(list[Any], value)]
        return value

    return restored(header)
