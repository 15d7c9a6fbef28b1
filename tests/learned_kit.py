"""What the tests of learned attention share: a gate that has moved, and the oracle over chosen blocks."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention import (
    Attention,
    Learned,
    build_attention,
)
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.pattern import Pattern

from .support import with_gradients


def build(pattern: Pattern, geometry: Geometry, *, seed: int = 0, **fields: Any) -> Attention:
    """An attention whose gate, if it has one, is no longer as it began."""
    defaults: dict[str, Any] = {
        "pattern": pattern,
        "num_heads": geometry.num_heads,
        "num_kv_heads": geometry.num_kv_heads,
        "head_dim": 8,
        "is_causal": geometry.is_causal,
    }
    attention = build_attention(defaults | fields)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.3)
    return attention


def learned() -> st.SearchStrategy[Learned]:
    return st.one_of(
        st.builds(Learned, st.integers(1, 5), st.integers(1, 20)),
        st.builds(Learned, block_size=st.integers(1, 20), density=st.sampled_from((0.01, 0.3, 1.0))),
    )


def masked_oracle(sees: Tensor, tensors: list[Tensor], scale: float) -> list[Tensor]:
    """out, lse and gradients of attention over `sees` (B, H, S, T), float64, from its definition alone."""
    q, k, v = leaves = [x.detach().double().requires_grad_() for x in tensors]
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    empty = ~sees.any(dim=-1)
    scores = (scale * q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).masked_fill(~sees, -torch.inf)
    scores = scores.masked_fill(empty[..., None], 0.0)
    lse = scores.logsumexp(dim=-1)
    weights = torch.exp(scores - lse[..., None]).masked_fill(empty[..., None], 0.0)
    out = (weights @ v.transpose(1, 2)).transpose(1, 2)
    return with_gradients(out, lse.masked_fill(empty, -torch.inf), leaves, through_lse=True)


def seen_pairs(tables: Tensor, geometry: Geometry, size: int) -> Tensor:
    """(B, H, S, T): the pairs of the listed blocks that causality allows."""
    rows, cols = -(-geometry.q_len // size), -(-geometry.kv_len // size)
    listed = torch.zeros(*tables.shape[:2], rows, cols + 1, dtype=torch.int64)
    listed.scatter_add_(-1, torch.where(tables < 0, cols, tables), torch.ones_like(tables))
    assert (listed[..., :cols] <= 1).all()
    pairs = listed[..., :cols].repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)
    pairs = pairs[:, :, : geometry.q_len, : geometry.kv_len] > 0
    if geometry.is_causal:
        query = torch.arange(geometry.q_len) + geometry.q_offset
        pairs &= (torch.arange(geometry.kv_len) + geometry.kv_offset) <= query[:, None]
    return pairs
