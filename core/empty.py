"""What attention is where there is nothing to compute: no queries, no keys, no batch rows, or no pairs of them.

Asked before any kernel, so that kernels never meet it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .merging import accumulator_dtype


def empty_results(query: Tensor) -> tuple[Tensor, Tensor]:
    """out, 0 like `query` (B, S, H, D), and lse (B, H, S), -inf in the accumulator's dtype; both contiguous."""
    batch, length, heads, _ = query.shape
    lse = torch.full((batch, heads, length), -math.inf, dtype=accumulator_dtype(query.dtype), device=query.device)
    return torch.zeros_like(query, memory_format=torch.contiguous_format), lse


def empty_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, all 0 and contiguous."""
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    return dq, dk, dv
