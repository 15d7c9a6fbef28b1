"""Builds and rebuilds that fail on some rank, one after another over one group."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from dilated_attention import (
    ContextParallel,
    DilatedAttentionError,
    Local,
    build_attention,
)  # fmt: skip
from dilated_attention.core.attention import Attention

from .ring_calls import FIELDS, leaf
from .ring_cases import mesh_of


def attempt(call: Callable[[], object]) -> tuple[str, str, float]:
    """The error's name, what it says, and after how long; no name where there was none."""
    before = time.perf_counter()
    try:
        call()
    except DilatedAttentionError as error:
        return type(error).__name__, str(error), time.perf_counter() - before
    return "", "", time.perf_counter() - before


def build(timeout_s: float = 30, **fields: Any) -> Attention:
    """An attention over all ranks."""
    size = dist.get_world_size()
    fields = {"context_parallel": ContextParallel(size=size, timeout_s=timeout_s), "pattern": Local(4)} | fields
    return build_attention(FIELDS | fields, mesh=mesh_of(size))


def works(attention: Attention) -> bool:
    """Whether a pass succeeds."""
    x = leaf()
    return bool(torch.isfinite(attention(x, x, x)).all())


def refused(odd: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Rank 0 asks for something else, that is refused there; then all build alike."""
    first = attempt(lambda: build(**(odd if dist.get_rank() == 0 else {})))
    return [first, attempt(lambda: works(build()))]
