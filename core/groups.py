"""Key-value heads that several query heads read, for kernels that know no groups.

Shapes: B, T, H, K and D as in `kernel`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def repeated_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values (B, T, K, D) as (B, T, heads, D): the heads of a group follow each other."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def summed_groups(x: Tensor, kv_heads: int) -> Tensor:
    """A gradient (B, T, H, D) of repeated heads as that of their `kv_heads`, (B, T, kv_heads, D)."""
    return x if x.shape[2] == kv_heads else torch.unflatten(x, 2, (kv_heads, -1)).sum(3)
