"""Waiting until a moment of `time.monotonic()`, and no longer."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store


def seconds_left(deadline: float) -> float:
    """A little where none are, since to sockets and stores 0 would mean something else."""
    return max(0.001, deadline - time.monotonic())


def time_left(deadline: float) -> timedelta:
    """As `seconds_left`, as torch takes it."""
    return timedelta(seconds=seconds_left(deadline))


def read_store(store: Store, key: str, deadline: float) -> bytes:
    """What another rank leaves under `key`; raises `RuntimeError` where it does not by the deadline."""
    store.wait([key], time_left(deadline))
    return bytes(store.get(key))
