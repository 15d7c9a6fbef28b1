"""What a cache for decoding is asked for, looked at before anything is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import require_int
from .context_parallel import refuse_in_ring
from .errors import ConfigError

if TYPE_CHECKING:
    from .engine import Engine


def check_request(engine: Engine, batch: int, most: int | None, max_crop: int) -> None:
    """Raise `ConfigError` for a cache that cannot be."""
    require_int("batch_size", batch, minimum=0)
    if most is not None:
        require_int("max_seq_len", most, minimum=1)
    require_int("max_crop", max_crop, minimum=0)
    if engine.config.ring_size > 1:
        refuse_in_ring(engine.config.ring_size, "make_cache")
    if not engine.config.is_causal:
        raise ConfigError("decoding token by token needs is_causal=True: without it earlier tokens see later ones")
    if "unequal_lengths" not in engine.call_axes:
        raise ConfigError(
            f"decoding needs queries and keys of different lengths, and the backend of kernel {engine.kernel.name!r} "
            "does not declare unequal_lengths; build with another backend"
        )


def check_rows(rows: Tensor, batch: int) -> None:
    """Raise `ConfigError` for what does not name sequences of a batch of that size."""
    if not (isinstance(rows, Tensor) and rows.dim() == 1 and rows.dtype in (torch.int32, torch.int64)):
        found = f"{rows.dtype} of shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ConfigError(
            f"rows must be a one-dimensional tensor of int32 or int64, the sequences to hold, got {found}; of a mask "
            "they are mask.nonzero().squeeze(1)"
        )
    wrong = [row for row in rows.tolist() if not 0 <= row < batch]
    if wrong:
        raise ConfigError(f"rows must be at least 0 and below batch_size={batch}, got {wrong[0]}")
