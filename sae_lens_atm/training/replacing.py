"""Something else in the place of a method of one object, for a while."""

from contextlib import ExitStack
from typing import Any


def replace(thing: Any, name: str, new: Any, undo: ExitStack) -> None:
    """Put it in its place; undoing puts back what was there, the object's own or its class's."""
    old, own = getattr(thing, name), name in vars(thing)
    setattr(thing, name, new)
    if own:
        undo.callback(setattr, thing, name, old)
    else:
        undo.callback(delattr, thing, name)
