"""Tiny language models whose predictions depend on their layers."""

from typing import TypeVar

from torch import nn

_Model = TypeVar("_Model", bound=nn.Module)


def lively(model: _Model) -> _Model:
    """Scale the weights up. At their usual size, a random model is all but the identity."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(10)
    return model
