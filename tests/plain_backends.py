"""Three backends that are right in everything, with steps as methods so that each can be spoilt.

Shapes: B batch, S query length, T key length, H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dilated_attention.core.kernel import DensePiece, LayoutPiece
from dilated_attention.core.reference import multiplicity
from dilated_attention.registry import Refusal, Request

from .dense_tables import dense_blocks

Grads = tuple[Tensor, Tensor, Tensor]


class Dense:
    """A dense kernel and its backend in one."""

    name = "plain"

    def refusals(self, request: Request) -> Iterable[Refusal]:
        return []

    def pin(self, request: Request) -> str:
        return self.name

    def build(self, request: Request) -> Any:
        return self

    def scores(self, query: Tensor, key: Tensor, piece: DensePiece) -> Tensor:
        """(B, H, S, T)"""
        s = piece.scale * torch.einsum("bshd,bthd->bhst", query, self.grouped(key, query))
        return s.masked_fill(~self.mask(s), -math.inf) if piece.is_causal else s

    def mask(self, s: Tensor) -> Tensor:
        return torch.ones_like(s, dtype=torch.bool).tril()

    def grouped(self, x: Tensor, query: Tensor) -> Tensor:
        return x.repeat_interleave(query.shape[2] // x.shape[2], dim=2)

    def wide(self, x: Tensor) -> Tensor:
        return x if x.dtype == torch.float64 else x.float()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        q, k, v = map(self.wide, (query, key, value))
        s = self.scores(q, k, piece)
        lse = torch.logsumexp(s, dim=-1)
        out = torch.einsum("bhst,bthd->bshd", torch.exp(s - lse[..., None]), self.grouped(v, q))
        return out.to(query.dtype), lse

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> Grads:
        q, k, v, g, o = map(self.wide, (query, key, value, dout, out))
        p = torch.exp(self.scores(q, k, piece) - lse[..., None])
        delta = (g * o).sum(-1).transpose(1, 2)
        ds = p * (torch.einsum("bshd,bthd->bhst", g, self.grouped(v, q)) - delta[..., None])
        group = query.shape[2] // key.shape[2]
        dq = piece.scale * torch.einsum("bhst,bthd->bshd", ds, self.grouped(k, q))
        dk = self.collected(piece.scale * torch.einsum("bhst,bshd->bthd", ds, q), group)
        dv = self.collected(torch.einsum("bhst,bshd->bthd", p, g), group)
        return dq.to(query.dtype), dk.to(query.dtype), dv.to(query.dtype)

    def collected(self, x: Tensor, group: int) -> Tensor:
        return torch.unflatten(x, 2, (x.shape[2] // group, group)).sum(3)


class Whole:
    """A kernel for whole layouts and its backend in one."""

    name = "plain whole"

    refusals = Dense.refusals
    pin = Dense.pin
    build = Dense.build

    def counts(self, piece: LayoutPiece) -> Tensor:
        return multiplicity(piece.layout.pattern, piece.layout.geometry).double()

    def logits(self, query: Tensor, key: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        """Scores (B, H, S, T) in float64 and their weights."""
        k = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
        s = piece.scale * torch.einsum("bshd,bthd->bhst", query.double(), k.double())
        return s, self.counts(piece)

    def summed(self, s: Tensor, counts: Tensor) -> Tensor:
        return torch.logsumexp(s + counts.log(), dim=-1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        s, counts = self.logits(query, key, piece)
        lse = self.summed(s, counts)
        p = counts * torch.exp(s - self.finite(lse)[..., None])
        v = value.repeat_interleave(query.shape[2] // value.shape[2], dim=2).double()
        out = torch.einsum("bhst,bthd->bshd", p, v)
        return out.to(query.dtype), lse.to(torch.promote_types(query.dtype, torch.float32))

    def finite(self, lse: Tensor) -> Tensor:
        return lse.masked_fill(lse == -math.inf, 0.0)

    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        piece: LayoutPiece,
        *,
        dlse: Tensor | None = None,
    ) -> Grads:
        s, counts = self.logits(query, key, piece)
        lse = self.summed(s, counts)
        p = counts * torch.exp(s - self.finite(lse)[..., None])
        v = value.repeat_interleave(query.shape[2] // key.shape[2], dim=2).double()
        delta = (p * torch.einsum("bshd,bthd->bhst", dout.double(), v)).sum(-1)
        delta = delta if dlse is None else delta - dlse
        return self.gradients(dout, query, key, value, lse, delta, piece)

    def gradients(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor, piece: LayoutPiece
    ) -> Grads:
        """From the rows' lse and their delta, both (B, H, S)."""
        s, counts = self.logits(query, key, piece)
        p = counts * torch.exp(s - self.finite(lse)[..., None])
        group = query.shape[2] // key.shape[2]
        k, v = (x.repeat_interleave(group, dim=2).double() for x in (key, value))
        g = dout.double()
        ds = p * (torch.einsum("bshd,bthd->bhst", g, v) - delta[..., None])
        dq = piece.scale * torch.einsum("bhst,bthd->bshd", ds, k)
        dk = piece.scale * torch.einsum("bhst,bshd->bthd", ds, query.double())
        dv = torch.einsum("bhst,bshd->bthd", p, g)
        dk, dv = (torch.unflatten(x, 2, (x.shape[2] // group, group)).sum(3) for x in (dk, dv))
        return dq.to(query.dtype), dk.to(query.dtype), dv.to(query.dtype)


class Ring(Whole):
    """Computes parts of rows too, and tables over keys that were copied together."""

    def counts(self, piece: LayoutPiece) -> Tensor:
        layout = piece.layout
        if layout.branches or layout.blocks is None:
            return super().counts(piece)
        return torch.from_numpy(dense_blocks(layout.blocks)).double()

    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        piece: LayoutPiece,
        *,
        dlse: Tensor | None = None,
    ) -> Grads:
        delta = (dout.double() * out.double()).sum(-1).transpose(1, 2)
        delta = delta if dlse is None else delta - dlse
        return self.gradients(dout, query, key, value, lse.double(), delta, piece)
