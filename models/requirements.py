"""Conditions on values in tensors, checked in eager mode and inside compiled graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import ConfigError


def require(condition: Tensor, message: str) -> None:
    """Raise `ConfigError` where the bool scalar is False.

    In a compiled graph it is an assertion of the graph (RuntimeError), since a graph cannot look at values.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise ConfigError(message)
