"""Batched matrix products, and what attention does with scores that it has formed.

Shapes: I items, of which each is some rows of queries with the keys that they see; R rows, C columns, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

_HALF: Final = (torch.bfloat16, torch.float16)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """Batched product with float32 sums and, for half-precision operands, a float32 result."""
    if a.dtype in _HALF:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a, b)


def widened(x: Tensor) -> Tensor:
    """float32 for halves on CPU, where `torch.bmm` takes no out_dtype."""
    return x.float() if x.dtype in _HALF and not x.is_cuda else x


def exponentials(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place exp(scores - top), its sums and top, over the last dimension; 0, 0 and 0 where all scores are -inf."""
    top = scores.amax(dim=-1, keepdim=True)
    top.masked_fill_(top == -math.inf, 0.0)
    weights = scores.sub_(top).exp_()
    return weights, weights.sum(dim=-1, keepdim=True), top


def attend_rows(scores: Tensor, v: Tensor, factors: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
    """Out (I, R, D) and lse (I, R) of scores (I, R, C), which are lost, and values (I, C, D); 0 and -inf without keys.

    `factors`, if any, gives those of dropout for the weights.
    """
    weights, total, top = exponentials(scores)
    if factors is not None:
        weights *= factors(weights)
    out = bmm(weights.to(v.dtype), v) / torch.where(total == 0, 1.0, total)
    return out, (top + total.log()).squeeze(-1)


def score_gradients(p: Tensor, kept: Tensor | None, do: Tensor, v: Tensor, delta: Tensor, scale: float) -> Tensor:
    """ds (I, R, C) = scale * p * (kept * do·v - delta), of weights p with the factors of dropout that were `kept`."""
    ds = bmm(do, v.mT)
    if kept is not None:
        ds *= kept
    return ds.sub_(delta).mul_(p).mul_(scale)
