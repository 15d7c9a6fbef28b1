"""Conditions on tensors, and on values in them, checked in eager mode and inside compiled graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import ConfigError


def require_tokens(tokens_BS: object) -> None:
    """Raise `ConfigError` unless they are (batch, seq_len) of integers."""
    if not isinstance(tokens_BS, Tensor) or tokens_BS.dtype not in (torch.int64, torch.int32):
        found = tokens_BS.dtype if isinstance(tokens_BS, Tensor) else type(tokens_BS).__name__
        raise ConfigError(f"tokens must be a tensor of int64 or int32, got {found}")
    if tokens_BS.dim() != 2:
        raise ConfigError(f"tokens must be (batch, seq_len), got {tuple(tokens_BS.shape)}")


def require(condition: Tensor, message: str) -> None:
    """Raise `ConfigError` where the bool scalar is False.

    In a compiled graph it is an assertion of the graph (RuntimeError), since a graph cannot look at values.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise ConfigError(message)
