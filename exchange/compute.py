"""The computation of one rank, without any communication: local keys, rows received from others, and their gradients.

Shapes: B batch, S queries of the shard, T keys, H query heads, K key-value heads, D head_dim, U received rows. A block
of rows on its way is (U, 2, B, D): keys and values of a row side by side. lse is (B, H, S), (B, S, H) in memory.
"""

from __future__ import annotations

import math

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..core.block_product import BlockProduct
from ..core.composer import Composer, accumulator_dtype, delta_of, merge_, widen_rows
from ..core.layout import BlockLayout, Layout
from ..core.schedule import Schedule, schedule
from .plan import BlockPart, RankPlan


@attrs.frozen(eq=False)
class Compute:
    """How pieces are computed.

    Attributes:
        composer: the local backend's kernel, made to compute schedules.
        device: of all tensors.
        dtype: of queries, keys and values.
        workspace_bytes: bound on the temporaries of blocks.
    """

    composer: Composer
    device: torch.device
    dtype: torch.dtype
    workspace_bytes: int

    def product(self, layout: BlockLayout | None) -> BlockProduct | None:
        """A table of blocks on the device."""
        if layout is None or not layout.cols.size:
            return None
        return BlockProduct.prepare(
            layout,
            scale=self.composer.scale,
            device=self.device,
            dtype=self.dtype,
            workspace_bytes=self.workspace_bytes,
        )

    def piece(self, layout: Layout) -> Piece:
        """A layout over keys that are there as a tensor."""
        blocks = 0 if layout.blocks is None else layout.blocks.pairs
        calls = schedule(layout.branches, layout.geometry)
        return Piece(self, calls, self.product(layout.blocks), calls.pairs + blocks)


@attrs.frozen(eq=False)
class Merged:
    """What the backward of every piece needs of the whole row.

    Attributes:
        dout: (B, S, H, D'), and query and out alike; D' has `WIDENING` more columns where lse has a gradient.
        query: see dout.
        out: see dout.
        lse: +inf in rows without keys.
        delta: (B, H, S), sum(dout * out) - dlse.
        dq: (B, S, H, D') of zeros in the accumulator's dtype, to which pieces add.
        head_dim: D.
    """

    dout: Tensor
    query: Tensor
    out: Tensor
    lse: Tensor
    delta: Tensor
    dq: Tensor
    head_dim: int

    @classmethod
    def of(cls, dout: Tensor, dlse: Tensor | None, query: Tensor, out: Tensor, lse: Tensor) -> Merged:
        """From the gradients of out and lse; dlse may be None."""
        head_dim, dtype = query.shape[3], accumulator_dtype(query.dtype)
        delta = delta_of(dout, dlse, out)
        if dlse is not None:
            dout, query, out = widen_rows(dout, dlse, query, out)
        dq = torch.zeros(query.shape, dtype=dtype, device=query.device)
        return cls(dout, query, out, torch.where(lse == -math.inf, math.inf, lse), delta, dq, head_dim)

    def widened(self, x: Tensor) -> Tensor:
        """Keys or values with as many columns as the query."""
        return functional.pad(x, (0, self.query.shape[3] - x.shape[3]))


@attrs.frozen(eq=False)
class Piece:
    """Queries of the shard against one tensor of keys: dense calls and a table of blocks; `pairs` a batch row."""

    compute: Compute
    schedule: Schedule
    blocks: BlockProduct | None
    pairs: int

    @property
    def is_empty(self) -> bool:
        """Nothing to compute."""
        return not self.schedule.calls and self.blocks is None

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        return self.schedule.nbytes + (0 if self.blocks is None else self.blocks.nbytes)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh out and lse in the accumulator's dtype, ready for others to be merged into."""
        dtype = accumulator_dtype(query.dtype)
        if self.blocks is None:
            out, lse = self.compute.composer.forward(query, key, value, self.schedule)
            out, lse = out.to(dtype).contiguous(), lse.transpose(1, 2).contiguous().transpose(1, 2)
        else:
            out, lse = self.blocks.forward(query, key, value)
            out, lse = out.contiguous(), lse.transpose(1, 2).contiguous().transpose(1, 2)
            self.compute.composer.merge_into(out, lse, query, key, value, self.schedule.calls)
        return out, lse

    def merge_into(self, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Merge this piece into what `forward` returned."""
        self.compute.composer.merge_into(out, lse, query, key, value, self.schedule.calls)
        if self.blocks is not None:
            merge_(out, lse, *self.blocks.forward(query, key, value))

    def backward(self, merged: Merged, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add to `merged.dq`; return dk and dv, (B, T, K, D) in the accumulator's dtype."""
        head_dim = merged.head_dim
        if self.schedule.calls:
            dk, dv = self._dense_backward(merged, merged.widened(key), merged.widened(value))
        else:
            dk, dv = (torch.zeros(x.shape, dtype=merged.dq.dtype, device=x.device) for x in (key, value))
        if self.blocks is not None:
            query, dout = merged.query[..., :head_dim], merged.dout[..., :head_dim]
            dq, more_k, more_v = self.blocks.backward(dout, query, key, value, merged.delta, merged.lse)
            merged.dq[..., :head_dim] += dq
            dk, dv = dk + more_k, dv + more_v
        return dk, dv

    def _dense_backward(self, merged: Merged, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`backward` of the dense calls, on widened keys and values."""
        composer, head_dim = self.compute.composer, merged.head_dim
        inputs = (merged.dout, merged.query, key, value, merged.out, merged.lse)
        if self.schedule.cover:
            dq, dk, dv = composer.backward(*inputs, self.schedule)
            merged.dq.add_(dq)
            dk, dv = (x.to(merged.dq.dtype) for x in (dk, dv))
        else:
            dk, dv = (torch.zeros(x.shape, dtype=merged.dq.dtype, device=x.device) for x in (key, value))
            composer.backward_into((merged.dq, dk, dv), *inputs, self.schedule.calls)
        return dk[..., :head_dim], dv[..., :head_dim]


@attrs.frozen(eq=False)
class _Stage:
    """Keys and values copied from received rows.

    Attributes:
        piece: is computed over them.
        target: places that are filled, the others being 0; None: all of them, in order.
        sources: the received rows that fill them.
        size: places, over all heads.
        heads: by which the places are ordered first.
        is_copy: the places are the received rows, in order.
    """

    piece: Piece
    target: Tensor | None
    sources: tuple[Tensor, ...]
    size: int
    heads: int
    is_copy: bool = False

    def fill(self, received: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, T, heads, D) as views of one copy."""
        if self.target is not None:
            staged = received.new_zeros((self.size, *received.shape[1:]))
            staged.index_copy_(0, self.target, received.index_select(0, self.sources[0]))
        elif self.is_copy:
            staged = received
        else:
            staged = torch.cat([received.index_select(0, source) for source in self.sources])
        shaped = torch.unflatten(staged, 0, (self.heads, -1)).permute(2, 3, 1, 0, 4)
        return shaped[0], shaped[1]

    def collect(self, grads: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add dk and dv (B, T, heads, D) to the rows they were copied from, grads (U, 2, B, D)."""
        staged = torch.stack([dk, dv]).permute(3, 2, 0, 1, 4).flatten(0, 1)
        if self.target is not None:
            grads.index_add_(0, self.sources[0], staged.index_select(0, self.target))
            return
        if self.is_copy:
            grads.add_(staged)
            return
        begin = 0
        for source in self.sources:  # rows repeat only from one call to the next, so every addition is determined
            grads.index_add_(0, source, staged[begin : begin + source.numel()])
            begin += source.numel()


@attrs.frozen(eq=False)
class RankProgram:
    """A rank's plan on its device.

    Attributes:
        plan: what it computes.
        local: over the rank's own keys.
        stages: over received rows.
        sent: of each rank, the own rows that go there, counted over (position, head).
    """

    plan: RankPlan
    local: Piece
    stages: tuple[_Stage, ...]
    sent: tuple[Tensor, ...]

    @classmethod
    def prepare(cls, plan: RankPlan, compute: Compute) -> RankProgram:
        """Move the plan's tables to the device."""

        def move(index: object) -> Tensor:
            return torch.as_tensor(index, dtype=torch.int64).to(compute.device)

        stages = []
        if plan.branches.sources:
            piece = Piece(compute, plan.branches.schedule, None, plan.branches.schedule.pairs)
            sources = tuple(move(source) for source in plan.branches.sources)
            stages.append(_Stage(piece, None, sources, plan.branches.staged, 1, _is_copy(plan)))
        for part in plan.blocks:
            stages.append(_block_stage(part, compute, move(part.target), move(part.source), plan.shards.num_kv_heads))
        return cls(plan, compute.piece(plan.local), tuple(stages), tuple(move(index) for index in plan.sent))

    @property
    def nbytes(self) -> int:
        """Memory of all tables, here and on the device."""
        stages = sum(stage.piece.nbytes for stage in self.stages)
        return 2 * self.plan.nbytes + self.local.nbytes + stages

    @property
    def pairs(self) -> int:
        """Pairs that a batch row of the rank counts."""
        return self.local.pairs + sum(stage.piece.pairs for stage in self.stages)

    def pack(self, key: Tensor, value: Tensor, to: int) -> Tensor:
        """The own rows that go to a rank, (n, 2, B, D) contiguous."""
        index = self.sent[to]
        rows = [x.flatten(1, 2).index_select(1, index).transpose(0, 1) for x in (key, value)]
        return torch.stack(rows, dim=1)

    def unpack(self, dk: Tensor, dv: Tensor, grads: Tensor, to: int) -> None:
        """Add the gradients that come back from a rank, (n, 2, B, D), to dk and dv (B, S, K, D), contiguous."""
        for x, grad in zip((dk, dv), grads.unbind(1), strict=True):
            x.view(x.shape[0], -1, x.shape[3]).index_add_(1, self.sent[to], grad.transpose(0, 1))

    def merge_received(self, out: Tensor, lse: Tensor, query: Tensor, received: Tensor) -> None:
        """Merge what received rows (U, 2, B, D) contribute."""
        for stage in self.stages:
            stage.piece.merge_into(out, lse, query, *stage.fill(received))

    def received_backward(self, merged: Merged, received: Tensor) -> Tensor:
        """Gradients of the received rows, (U, 2, B, D) in the accumulator's dtype; adds to `merged.dq`."""
        grads = torch.zeros(received.shape, dtype=merged.dq.dtype, device=received.device)
        for stage in self.stages:
            key, value = stage.fill(received)
            stage.collect(grads, *stage.piece.backward(merged, key, value))
        return grads


def _is_copy(plan: RankPlan) -> bool:
    sources = plan.branches.sources
    return len(sources) == 1 and np.array_equal(sources[0], np.arange(plan.received.size))


def _block_stage(part: BlockPart, compute: Compute, target: Tensor, source: Tensor, heads: int) -> _Stage:
    piece = Piece(compute, Schedule((), 0), compute.product(part.layout), part.layout.pairs)
    return _Stage(piece, target, (source,), heads * part.slots, heads)
