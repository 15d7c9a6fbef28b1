"""Checks of what a ring asks of a kernel: parts of rows, merged by their lse, and gradients that know the whole row.

A ring of three ranks is computed in one process, with the kernel that was built and the exchange's own plans; what a
backend for whole layouts leaves to a companion is computed densely here, in float64.
Shapes: B batch, S query length, T key length, H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch
from torch import Tensor

from ...core.composer import Composer
from ...core.groups import repeated_heads, summed_groups
from ...core.limits import Limits
from ...exchange.compute import Compute
from ...exchange.shards import Shards
from .case import Subject
from .measure import NAMES, Finding, upstream
from .simulation import simulate

if TYPE_CHECKING:
    from ...core.kernel import DensePiece

RANKS: Final = 3
LENGTH: Final = 44 * RANKS


class ExactDense:
    """A companion: dense pieces by the definition, in float64."""

    name: Final = "dense float64"

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        """As `DenseKernel.forward`."""
        scores = self._scores(query, key, piece)
        lse = torch.logsumexp(scores, -1)
        out = torch.einsum("bhst,bthd->bshd", torch.exp(scores - lse[..., None]), _per_head(value, query))
        return out.to(query.dtype), lse.to(torch.promote_types(query.dtype, torch.float32))

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `DenseKernel.backward`."""
        p = torch.exp(self._scores(query, key, piece) - lse.double()[..., None])
        delta = (dout.double() * out.double()).sum(-1).transpose(1, 2)
        ds = p * (torch.einsum("bshd,bthd->bhst", dout.double(), _per_head(value, query)) - delta[..., None])
        dq = piece.scale * torch.einsum("bhst,bthd->bshd", ds, _per_head(key, query))
        dk = piece.scale * torch.einsum("bhst,bshd->bthd", ds, query.double())
        dv = torch.einsum("bhst,bshd->bthd", p, dout.double())
        dk, dv = (summed_groups(x, key.shape[2]) for x in (dk, dv))
        return dq.to(query.dtype), dk.to(query.dtype), dv.to(query.dtype)

    def _scores(self, query: Tensor, key: Tensor, piece: DensePiece) -> Tensor:
        """(B, H, S, T)"""
        scores = piece.scale * torch.einsum("bshd,bthd->bhst", query.double(), _per_head(key, query))
        if piece.is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        return scores


def _per_head(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values, a head for each of the query's, in float64."""
    return repeated_heads(x.double(), query.shape[2])


def ring(subject: Subject) -> Iterator[Finding]:
    """Three ranks that share a sequence, each with its own keys and rows of the others, compute the oracle's shards."""
    yield from _compared(subject, _compute(subject), "by the rows that are named")
    yield from _compared(subject, _compute(subject), "hop by hop", hops=True)


def staged_blocks(subject: Subject) -> Iterator[Finding]:
    """Tables of blocks over keys that were copied together are computed as they say, wherever the keys come from."""
    yield from _compared(subject, attrs.evolve(_compute(subject), takes_staged=True), "over received blocks")


def _compute(subject: Subject) -> Compute:
    """How a ring computes with the kernel that was built."""
    engine: Any = subject.attention._engine
    if engine._composers is None:
        composer, whole = Composer(ExactDense(), engine.scale, subject.case.deterministic), engine.kernel
    else:
        composer, whole = engine._composers.own, None
    return Compute(composer, torch.device(subject.case.device), subject.torch_dtype, Limits().workspace_bytes, whole)


def _compared(subject: Subject, compute: Compute, how: str, *, hops: bool = False) -> Iterator[Finding]:
    """What the ranks compute against the oracle, with a gradient through lse too where the backend carries one."""
    case = subject.case
    shards = Shards(case.q_len // RANKS, RANKS, case.num_heads, case.num_kv_heads, case.is_causal)
    query = subject.inputs[0]
    lse_shape = (case.batch, case.num_heads, case.q_len)
    grads = upstream(query.shape, lse_shape, subject.torch_dtype, query.device) if case.requires_grad else (None, None)
    dlses = (None, grads[1]) if case.requires_grad and subject.attention._engine.has_dlse else (None,)
    for dlse in dlses:
        found = simulate(case.pattern, shards, compute, subject.inputs, dout=grads[0], dlse=dlse, hops=hops)
        expected = subject.expected if dlse is None else subject.oracle(subject.inputs, through_lse=True)
        through = "" if dlse is None else ", through lse"
        yield from subject.compared(dict(zip(NAMES, found, strict=False)), expected, f"{how}{through}")
