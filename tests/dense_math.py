"""The arithmetic that stand-ins for kernel libraries compute with, on CPU, and what the real ones ask of tensors.

Shapes: queries (B, S, H, D), keys and values (B, T, K, D), lse (B, H, S).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_aligned(*tensors: Tensor) -> bool:
    """Addresses and strides are multiples of 16 bytes and the last dimension is contiguous."""
    return all(
        x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
        for x in tensors
    )


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Out in the dtype of the queries and lse in float32, computed in float64."""
    scores = _scores(query, key, scale, is_causal)
    out = torch.einsum("bhst,bthd->bshd", scores.softmax(-1), _each(value, query))
    return out.to(query.dtype), scores.logsumexp(-1).float()


def backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the dtype of the queries, for out and lse of the whole row."""
    assert lse.is_contiguous()
    assert lse.shape == (query.shape[0], query.shape[2], query.shape[1])
    p = (_scores(query, key, scale, is_causal) - lse.double().unsqueeze(-1)).exp()
    delta = (dout.double() * out.double()).sum(-1).transpose(1, 2).unsqueeze(-1)
    ds = p * (torch.einsum("bshd,bthd->bhst", dout.double(), _each(value, query)) - delta) * scale
    dq = torch.einsum("bhst,bthd->bshd", ds, _each(key, query)).to(query.dtype)
    wide = (torch.einsum("bhst,bshd->bthd", x, y.double()) for x, y in ((ds, query), (p, dout)))
    dk, dv = (torch.unflatten(x, 2, (key.shape[2], -1)).sum(3).to(query.dtype) for x in wide)
    return dq, dk, dv


def _each(x: Tensor, query: Tensor) -> Tensor:
    """One head of x for each query head, float64."""
    return x.double().repeat_interleave(query.shape[2] // x.shape[2], 2)


def _scores(query: Tensor, key: Tensor, scale: float, is_causal: bool) -> Tensor:
    scores = torch.einsum("bshd,bthd->bhst", query.double(), _each(key, query)) * scale
    future = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf) if is_causal else scores
