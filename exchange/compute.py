"""The computation of one rank, without any communication: local keys, rows received from others, and their gradients.

Shapes: B batch, S queries of the shard, T keys, H query heads, K key-value heads, D head_dim, U received rows. A block
of rows on its way is (U, 2, B, D): keys and values of a row side by side. lse is (B, H, S).
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
import torch
from torch import Tensor

from ..core.band_calls import dense_form
from ..core.block_product import BlockProduct
from ..core.composer import Composer
from ..core.kernel import Adds, LayoutKernel, LayoutPiece, Prepares, takes_windows
from ..core.layout import BlockLayout, Layout
from ..core.merging import accumulator_dtype
from ..core.pattern import Pattern
from ..core.schedule import Schedule, schedule
from .pieces import ComposedPiece, EmptyPiece, Merged, Piece, WholePiece, WholeRows
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
        dense = dense_form(layout.pattern, layout.geometry, windows=takes_windows(self.composer.kernel))
        if dense is not None:
            return ComposedPiece(self.composer, dense.schedule, None, dense.schedule.pairs)
        blocks = 0 if layout.blocks is None else layout.blocks.pairs
        calls = schedule(layout.branches, layout.geometry)
        return ComposedPiece(self.composer, calls, self._product(layout.blocks), calls.pairs + blocks)

    def staged_calls(self, calls: Schedule) -> Piece:
        """Dense calls over keys that were copied together."""
        return ComposedPiece(self.composer, calls, None, calls.pairs)

    def staged_blocks(self, pattern: Pattern, blocks: BlockLayout) -> Piece:
        """A table of `pattern`'s blocks over keys that were copied together."""
        if self.layout_kernel is not None and self.takes_staged:
            return self._whole(self.layout_kernel, Layout(pattern, blocks.geometry, (), blocks), is_staged=True)
        return ComposedPiece(self.composer, Schedule((), 0), self._product(blocks), blocks.pairs)

    def _whole(self, kernel: LayoutKernel, layout: Layout, *, is_staged: bool = False) -> Piece:
        if not layout.pairs:
            return EmptyPiece()
        prepared = kernel.prepare(layout, self.device) if isinstance(kernel, Prepares) else 0
        scale, deterministic = self.composer.scale, self.composer.deterministic
        piece = LayoutPiece(layout=layout, scale=scale, deterministic=deterministic, is_part=True)
        adds = kernel if isinstance(kernel, Adds) else None
        return WholePiece(kernel, piece, layout.pairs, layout.nbytes + prepared, adds, is_staged)

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


@attrs.frozen(eq=False)
class _Stage:
    """Keys and values copied from received rows.

    Attributes:
        piece: is computed over them.
        target: places that are filled, the others being 0; None: all of them, in order.
        sources: the received rows that fill them.
        homes: where `target` is given, received rows (n,), none twice, and the places (n, c) that each of them fills.
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
    homes: tuple[tuple[Tensor, Tensor], ...] = ()

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
            for rows, places in self.homes:
                copies = staged.index_select(0, places.flatten()).view(*places.shape, *staged.shape[1:])
                grads.index_add_(0, rows, copies.squeeze(1) if places.shape[1] == 1 else copies.sum(1))
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
        sent: the own rows that go to other ranks, rank after rank, counted over (position, head).
        send_counts: how many of them go to each rank.
        shared: the own rows that go anywhere, ascending.
        places: of each rank, where its rows are among those.
    """

    plan: RankPlan
    local: Piece
    stages: tuple[_Stage, ...]
    sent: Tensor
    send_counts: list[int]
    shared: Tensor
    places: tuple[Tensor, ...]

    @classmethod
    def prepare(cls, plan: RankPlan, compute: Compute) -> RankProgram:
        """Move the plan's tables to the device."""

        def move(index: object) -> Tensor:
            return torch.as_tensor(index, dtype=torch.int64).to(compute.device)

        stages: list[_Stage] = []
        if plan.branches.sources:
            piece = compute.staged_calls(plan.branches.schedule)
            sources = tuple(move(source) for source in plan.branches.sources)
            stages.append(_Stage(piece, None, sources, plan.branches.staged, 1, _is_copy(plan)))
        for part in plan.blocks:
            heads, slots = plan.shards.num_kv_heads, part.slots
            piece = compute.staged_blocks(plan.local.pattern, part.layout)
            homes = tuple((move(rows), move(places)) for rows, places in part.homes)
            target, source = move(part.target), move(part.source)
            stages.append(_Stage(piece, target, (source,), heads * slots, heads, homes=homes))
        shared = np.unique(np.concatenate(plan.sent))
        places = tuple(move(np.searchsorted(shared, index)) for index in plan.sent)
        sent, counts = move(np.concatenate(plan.sent)), [index.size for index in plan.sent]
        return cls(plan, compute.shard(plan.local), tuple(stages), sent, counts, move(shared), places)

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

    def pack(self, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """The own rows that go to each rank, (n, 2, B, D) contiguous."""
        if not self.sent.numel():
            return tuple(key.new_empty((0, 2, key.shape[0], key.shape[3])) for _ in self.send_counts)
        rows = [x.flatten(1, 2).index_select(1, self.sent).transpose(0, 1) for x in (key, value)]
        return torch.stack(rows, dim=1).split_with_sizes(self.send_counts)

    def unpack(self, dk: Tensor, dv: Tensor, home: Sequence[Tensor]) -> None:
        """Add the gradients that come back from each rank, (n, 2, B, D), to dk and dv (B, S, K, D), contiguous.

        Of the rows that went anywhere the sum is made in the accumulator's dtype, and rounded once.
        """
        arrived = {to: grads for to, grads in enumerate(home) if grads.numel()}
        for place, x in enumerate((dk, dv) if arrived else ()):
            rows = x.flatten(1, 2)
            total = rows.index_select(1, self.shared).to(accumulator_dtype(x.dtype))
            for to, grads in arrived.items():
                total.index_add_(1, self.places[to], grads[:, place].transpose(0, 1))
            rows.index_copy_(1, self.shared, total.to(x.dtype))

    def merge_received(self, out: Tensor, lse: Tensor, query: Tensor, received: Tensor) -> None:
        """Merge what received rows (U, 2, B, D) contribute into what `mergeable` returned."""
        for stage in self.stages:
            stage.piece.merge_into(out, lse, query, *stage.fill(received))

    def read(self, rows: WholeRows) -> None:
        """Have all made that the backward of any piece needs of the rows."""
        for piece in (self.local, *(stage.piece for stage in self.stages)):
            piece.read(rows)

    def received_backward(self, merged: Merged, received: Tensor) -> Tensor:
        """Gradients of the received rows, (U, 2, B, D) in the accumulator's dtype; adds to `merged`."""
        grads = torch.zeros(received.shape, dtype=merged.rows.dtype, device=received.device)
        for stage in self.stages:
            key, value = stage.fill(received)
            stage.collect(grads, *stage.piece.backward(merged, key, value))
        return grads


def _is_copy(plan: RankPlan) -> bool:
    sources = plan.branches.sources
    return len(sources) == 1 and np.array_equal(sources[0], np.arange(plan.received.size))
