"""The computation of one rank, without any communication: local keys, rows received from others, and their gradients.

Shapes: B batch, S queries of the shard, T keys, H query heads, K key-value heads, D head_dim, U received rows. A block
of rows on its way is (U, 2, B, D): keys and values of a row side by side. lse is (B, H, S), (B, S, H) in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..core.block_product import BlockProduct
from ..core.composer import Composer, accumulator_dtype, delta_of, merge_, widen_rows
from ..core.kernel import LayoutKernel, LayoutPiece, Prepares
from ..core.layout import BlockLayout, Layout
from ..core.pattern import Pattern
from ..core.schedule import Schedule, schedule
from .empty_piece import EmptyPiece
from .plan import RankPlan


@attrs.frozen(eq=False)
class Compute:
    """How pieces are computed.

    Attributes:
        composer: the kernel for dense pieces, made to compute schedules.
        device: of all tensors.
        dtype: of queries, keys and values.
        workspace_bytes: bound on the temporaries of core's block product.
        layout_kernel: computes keys that are there as shards, where the local backend takes whole layouts.
        takes_staged: it takes tables of blocks over keys that were copied together too.
    """

    composer: Composer
    device: torch.device
    dtype: torch.dtype
    workspace_bytes: int
    layout_kernel: LayoutKernel | None = None
    takes_staged: bool = False

    def shard(self, layout: Layout) -> Piece:
        """A layout over the keys of one shard, which are there as they stand in the sequence."""
        if self.layout_kernel is not None:
            return self._whole(self.layout_kernel, layout)
        blocks = 0 if layout.blocks is None else layout.blocks.pairs
        calls = schedule(layout.branches, layout.geometry)
        return ComposedPiece(self, calls, self._product(layout.blocks), calls.pairs + blocks)

    def staged_calls(self, calls: Schedule) -> Piece:
        """Dense calls over keys that were copied together."""
        return ComposedPiece(self, calls, None, calls.pairs)

    def staged_blocks(self, pattern: Pattern, blocks: BlockLayout) -> Piece:
        """A table of `pattern`'s blocks over keys that were copied together."""
        if self.layout_kernel is not None and self.takes_staged:
            return self._whole(self.layout_kernel, Layout(pattern, blocks.geometry, (), blocks))
        return ComposedPiece(self, Schedule((), 0), self._product(blocks), blocks.pairs)

    def _whole(self, kernel: LayoutKernel, layout: Layout) -> Piece:
        if not layout.pairs:
            return EmptyPiece()
        if isinstance(kernel, Prepares):
            kernel.prepare(layout, self.device)
        scale, deterministic = self.composer.scale, self.composer.deterministic
        piece = LayoutPiece(layout=layout, scale=scale, deterministic=deterministic, is_part=True)
        return WholePiece(kernel, piece, layout.pairs)

    def _product(self, layout: BlockLayout | None) -> BlockProduct | None:
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


def mergeable(out: Tensor, lse: Tensor, *, once: bool = False) -> tuple[Tensor, Tensor]:
    """`out` and `lse` as pieces are merged into them: in the accumulator's dtype, both (B, S, H, ...) in memory.

    Where no row is merged into more than `once`, `out` keeps its dtype: one more rounding costs less than passes over
    whole tensors of twice the size.
    """
    out = out if once else out.to(lse.dtype)
    return out.contiguous(), lse.transpose(1, 2).contiguous().transpose(1, 2)


@attrs.define(eq=False)
class Merged:
    """What the backward of every piece needs of the whole row, and the sum of their gradients of queries.

    Attributes:
        dout: (B, S, H, D), and query and out alike.
        dlse: (B, H, S) contiguous, or None.
        query: see dout.
        out: see dout.
        lse: (B, H, S) contiguous, -inf in rows without keys.
        once: no row has gradients of more than two pieces, whose sum is then of the queries' dtype.
    """

    dout: Tensor
    dlse: Tensor | None
    query: Tensor
    out: Tensor
    lse: Tensor
    once: bool = False
    _dq: Tensor | None = attrs.field(default=None, init=False)

    @property
    def dtype(self) -> torch.dtype:
        """The accumulator's."""
        return accumulator_dtype(self.query.dtype)

    @cached_property
    def delta(self) -> Tensor:
        """(B, H, S), sum(dout * out) - dlse."""
        return delta_of(self.dout, self.dlse, self.out)

    @cached_property
    def row_lse(self) -> Tensor:
        """`lse` as dense kernels take it: (B, S, H) in memory, +inf in rows without keys."""
        lse = self.lse.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.where(lse == -math.inf, math.inf, lse)

    @cached_property
    def wide(self) -> tuple[Tensor, Tensor, Tensor]:
        """dout, query and out, with `WIDENING` more columns where lse has a gradient."""
        if self.dlse is None:
            return self.dout, self.query, self.out
        return widen_rows(self.dout, self.dlse, self.query, self.out)

    def widened(self, x: Tensor) -> Tensor:
        """Keys or values with as many columns as `wide`."""
        return x if self.dlse is None else functional.pad(x, (0, self.wide[1].shape[3] - x.shape[3]))

    def add(self, dq: Tensor) -> None:
        """Add a gradient of all queries, (B, S, H, D), a tensor of its own; the first one is taken as it is."""
        self._dq = dq if self._dq is None else self._dq.to(self._sum_dtype).add_(dq)

    @property
    def _sum_dtype(self) -> torch.dtype:
        return self.query.dtype if self.once else self.dtype

    def sums(self) -> Tensor:
        """The sum so far, (B, S, H, D) contiguous, for gradients of some queries to be added."""
        if self._dq is None:
            self._dq = torch.zeros(self.query.shape, dtype=self._sum_dtype, device=self.query.device)
        self._dq = self._dq.to(self._sum_dtype).contiguous()
        return self._dq

    def dq(self) -> Tensor:
        """The gradient of the queries, contiguous in their dtype."""
        total = torch.zeros_like(self.query) if self._dq is None else self._dq
        return total.to(self.query.dtype).contiguous()


class Piece(Protocol):
    """Queries of the shard against one tensor of keys; a batch row counts `pairs`."""

    @property
    def pairs(self) -> int:
        """Pairs that a batch row counts."""

    @property
    def is_empty(self) -> bool:
        """Nothing to compute."""

    @property
    def merges(self) -> int:
        """How often it merges into a row at most."""

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh out and lse as the kernel gives them; `mergeable` prepares them for other pieces."""

    def merge_into(self, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Merge this piece into what `mergeable` returned."""

    def backward(self, merged: Merged, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add to `merged`; return dk and dv, (B, T, K, D) in the inputs' or the accumulator's dtype."""


@attrs.frozen(eq=False)
class ComposedPiece:
    """A `Piece` of dense calls and a table of blocks, which core composes."""

    compute: Compute
    schedule: Schedule
    blocks: BlockProduct | None
    pairs: int

    @property
    def is_empty(self) -> bool:
        """As `Piece.is_empty`."""
        return not self.schedule.calls and self.blocks is None

    @property
    def merges(self) -> int:
        """As `Piece.merges`: calls of one name are of one branch, and no row is in two of them."""
        return len({call.name for call in self.schedule.calls}) + (self.blocks is not None)

    @property
    def nbytes(self) -> int:
        """As `Piece.nbytes`."""
        return self.schedule.nbytes + (0 if self.blocks is None else self.blocks.nbytes)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Piece.forward`."""
        if self.blocks is None:
            return self.compute.composer.forward(query, key, value, self.schedule)
        out, lse = mergeable(*self.blocks.forward(query, key, value))
        self.compute.composer.merge_into(out, lse, query, key, value, self.schedule.calls)
        return out, lse

    def merge_into(self, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        """As `Piece.merge_into`."""
        self.compute.composer.merge_into(out, lse, query, key, value, self.schedule.calls)
        if self.blocks is not None:
            merge_(out, lse, *self.blocks.forward(query, key, value))

    def backward(self, merged: Merged, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Piece.backward`."""
        if self.blocks is None:
            return self._dense_backward(merged, key, value)
        rows = merged.dout, merged.query, key, value, merged.delta, merged.row_lse
        dq, dk, dv = self.blocks.backward(*rows)
        merged.add(dq)
        if self.schedule.calls:
            more_k, more_v = self._dense_backward(merged, key, value)
            dk, dv = dk + more_k, dv + more_v
        return dk, dv

    def _dense_backward(self, merged: Merged, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`backward` of the dense calls."""
        composer, head_dim = self.compute.composer, key.shape[3]
        dout, query, out = merged.wide
        key, value = merged.widened(key), merged.widened(value)
        inputs = (dout, query, key, value, out, merged.row_lse)
        if self.schedule.cover:
            dq, dk, dv = composer.backward(*inputs, self.schedule)
            merged.add(dq[..., :head_dim])
        else:
            dk, dv = (torch.zeros(x.shape, dtype=merged.dtype, device=x.device) for x in (key, value))
            if merged.dlse is None:
                composer.backward_into((merged.sums(), dk, dv), *inputs, self.schedule.calls)
            else:
                dq = torch.zeros(query.shape, dtype=merged.dtype, device=query.device)
                composer.backward_into((dq, dk, dv), *inputs, self.schedule.calls)
                merged.add(dq[..., :head_dim])
        return dk[..., :head_dim], dv[..., :head_dim]


@attrs.frozen(eq=False)
class WholePiece:
    """A `Piece` that a kernel for whole layouts computes in one go."""

    kernel: LayoutKernel
    piece: LayoutPiece
    pairs: int

    @property
    def is_empty(self) -> bool:
        """As `Piece.is_empty`."""
        return not self.pairs

    @property
    def merges(self) -> int:
        """As `Piece.merges`."""
        return 1

    @property
    def nbytes(self) -> int:
        """As `Piece.nbytes`, the kernel's own tables not known."""
        return self.piece.layout.nbytes

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Piece.forward`."""
        return self.kernel.forward(query, key, value, self.piece)

    def merge_into(self, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        """As `Piece.merge_into`."""
        merge_(out, lse, *self.kernel.forward(query, key, value, self.piece))

    def backward(self, merged: Merged, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Piece.backward`."""
        rows = merged.dout, merged.query, key, value, merged.out, merged.lse
        dq, dk, dv = self.kernel.backward(*rows, self.piece, dlse=merged.dlse)
        merged.add(dq)
        return dk, dv


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
        staged = torch.stack([dk, dv]).permute(3, 2, 0, 1, 4).flatten(0, 1).to(grads.dtype)
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
        shared: the own rows that go anywhere, ascending.
        places: of each rank, where its rows are among those.
    """

    plan: RankPlan
    local: Piece
    stages: tuple[_Stage, ...]
    sent: tuple[Tensor, ...]
    shared: Tensor
    places: tuple[Tensor, ...]

    @classmethod
    def prepare(cls, plan: RankPlan, compute: Compute) -> RankProgram:
        """Move the plan's tables to the device."""

        def move(index: object) -> Tensor:
            return torch.as_tensor(index, dtype=torch.int64).to(compute.device)

        stages = []
        if plan.branches.sources:
            piece = compute.staged_calls(plan.branches.schedule)
            sources = tuple(move(source) for source in plan.branches.sources)
            stages.append(_Stage(piece, None, sources, plan.branches.staged, 1, _is_copy(plan)))
        for part in plan.blocks:
            heads, slots = plan.shards.num_kv_heads, part.slots
            piece = compute.staged_blocks(plan.local.pattern, part.layout)
            stages.append(_Stage(piece, move(part.target), (move(part.source),), heads * slots, heads))
        shared = np.unique(np.concatenate(plan.sent))
        places = tuple(move(np.searchsorted(shared, index)) for index in plan.sent)
        sent = tuple(move(index) for index in plan.sent)
        return cls(plan, compute.shard(plan.local), tuple(stages), sent, move(shared), places)

    @property
    def nbytes(self) -> int:
        """Memory of all tables, here and on the device."""
        stages = sum(stage.piece.nbytes for stage in self.stages)
        return 3 * self.plan.nbytes + self.local.nbytes + stages

    @property
    def once(self) -> bool:
        """Whether received rows are merged into no row of queries more than once."""
        return sum(stage.piece.merges for stage in self.stages) <= 1

    @property
    def pairs(self) -> int:
        """Pairs that a batch row of the rank counts."""
        return self.local.pairs + sum(stage.piece.pairs for stage in self.stages)

    def pack(self, key: Tensor, value: Tensor, to: int) -> Tensor:
        """The own rows that go to a rank, (n, 2, B, D) contiguous."""
        index = self.sent[to]
        rows = [x.flatten(1, 2).index_select(1, index).transpose(0, 1) for x in (key, value)]
        return torch.stack(rows, dim=1)

    def unpack(self, dk: Tensor, dv: Tensor, home: Mapping[int, Tensor]) -> None:
        """Add the gradients that come back from ranks, (n, 2, B, D) each, to dk and dv (B, S, K, D), contiguous.

        Of the rows that went anywhere the sum is made in the gradients' dtype, and rounded once.
        """
        for place, x in enumerate((dk, dv)):
            rows = x.view(x.shape[0], -1, x.shape[3])
            total: Tensor | None = None
            for to, grads in home.items():
                if grads.numel():
                    total = rows.index_select(1, self.shared).to(grads.dtype) if total is None else total
                    total.index_add_(1, self.places[to], grads[:, place].transpose(0, 1))
            if total is not None:
                rows.index_copy_(1, self.shared, total.to(x.dtype))

    def merge_received(self, out: Tensor, lse: Tensor, query: Tensor, received: Tensor) -> None:
        """Merge what received rows (U, 2, B, D) contribute into what `mergeable` returned."""
        for stage in self.stages:
            stage.piece.merge_into(out, lse, query, *stage.fill(received))

    def received_backward(self, merged: Merged, received: Tensor) -> Tensor:
        """Gradients of the received rows, (U, 2, B, D) in the accumulator's dtype; adds to `merged`."""
        grads = torch.zeros(received.shape, dtype=merged.dtype, device=received.device)
        for stage in self.stages:
            key, value = stage.fill(received)
            stage.collect(grads, *stage.piece.backward(merged, key, value))
        return grads


def _is_copy(plan: RankPlan) -> bool:
    sources = plan.branches.sources
    return len(sources) == 1 and np.array_equal(sources[0], np.arange(plan.received.size))
