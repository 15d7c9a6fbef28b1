"""The kernel that runs the fused launches over a layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...core.merging import merge_
from ...core.pattern import LearnedPattern
from ...core.tracing import span
from ..launching import launch
from . import gradient_kernels
from .block_tables import KnownBlocks
from .draws import draws_of
from .launches import BOUND_FROM, LEVEL_ROWS, STATS_ROWS, BlockPart, BranchPart, Part, in_lines
from .named_blocks import NamedBlocks
from .packed_blocks import packed_blocks
from .tiles import TileSizes, ceil_div, padded

if TYPE_CHECKING:
    from ...core.documents import Packing
    from ...core.kernel import LayoutPiece
    from ...core.layout import Layout
    from .launches import Blocks
    from .tiles import Pass

_LOG2_E: Final = 1.4426950408889634
Draws = Sequence[Tensor]


class FusedKernel:
    """Computes a `LayoutPiece`: a launch forward for each kind of part that it has.

    Backward it is one launch for all gradients where there is a kernel for that, which adds dq atomically; else, and
    where the same bits are asked for (of the piece, or of PyTorch), one for queries and one for keys.

    Args:
        name: the pinned sub-kernel, as the plan shows it.
        tiles: of the kernels.
        bound_from: from how many pairs a key on a part bounds the scores before it attends.
        dropping: of the kernels that drop weights, where that is done in training.
    """

    def __init__(
        self, name: str, tiles: TileSizes, bound_from: int = BOUND_FROM, *, dropping: TileSizes | None = None
    ) -> None:
        self.name = name
        self.tiles = tiles
        self._bound_from = bound_from
        self._dropping = dropping
        self._parts: WeakKeyDictionary[Layout, dict[tuple[torch.device, Packing | None, bool], tuple[Part, ...]]]
        self._parts = WeakKeyDictionary()

    @property
    def draws_on_device(self) -> bool:
        """See `DrawsOnDevice`."""
        return True

    def prepare(self, layout: Layout, device: torch.device) -> int:
        """Make the tables of a layout ahead of its first call, which may be captured in a CUDA graph."""
        kinds = (False, True) if self._dropping else (False,)
        return sum(part.nbytes for drops in kinds for part in self.parts(layout, device, drops=drops))

    def prepare_packing(self, layout: Layout, packing: Packing, device: torch.device, *, deterministic: bool) -> int:
        """As `Packs.prepare_packing`; where weights are dropped, for training, which often meets other documents."""
        parts = self.parts(layout, device, packing, deterministic=deterministic, drops=self._dropping is not None)
        return sum(part.nbytes for part in parts)

    def parts(
        self,
        layout: Layout,
        device: torch.device,
        packing: Packing | None = None,
        *,
        deterministic: bool = False,
        drops: bool = False,
    ) -> tuple[Part, ...]:
        """The parts of a layout with their tables on the device, of all documents of a packing; made once."""
        known, key = self._parts.setdefault(layout, {}), (device, packing, drops)
        if key not in known:
            tiles = self._dropping if drops else self.tiles
            assert tiles is not None
            found: list[Part] = []
            if layout.branches:
                given = (layout.branches, layout.geometry, tiles.branches, device, self._bound_from, packing)
                found.append(BranchPart(*given, deterministic=deterministic, apart=drops))
            blocks = _blocks_of(layout, device, packing, apart=drops)
            if blocks is not None:
                found.append(BlockPart(blocks, tiles.within(blocks.block_size), self._bound_from))
            known[key] = tuple(found)
        return known[key]

    def _parts_of(self, piece: LayoutPiece, query: Tensor) -> tuple[Part, ...]:
        return self.parts(piece.layout, query.device, piece.packing, drops=piece.seed is not None)

    def _draws(self, piece: LayoutPiece, query: Tensor, key: Tensor, *, backward: bool) -> Draws:
        """Of each part what it drops; of none where nothing is dropped."""
        if piece.seed is None:
            return ()
        parts = enumerate(self._parts_of(piece, query))
        return [draws_of(piece, i, part.occurrences, query, key, backward=backward) for i, part in parts]

    def _taken(self, piece: LayoutPiece, query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """The queries, with the sign of the scale, and others, as the kernels take them."""
        return tuple(in_lines(x) for x in (-query if piece.scale < 0 else query, *others))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        """As `LayoutKernel.forward`."""
        batch, length, heads, _ = query.shape
        parts = self._parts_of(piece, query)
        query, key, value = self._taken(piece, query, key, value)
        merged: tuple[Tensor, Tensor] | None = None
        for part, draws in zip_longest(parts, self._draws(piece, query, key, backward=False)):
            out = _room(query.shape, _part_dtype(query, parts), query.device, piece)
            lse = _room((batch, heads, length), torch.float32, query.device, piece, -math.inf)
            scales = (abs(piece.scale) * _LOG2_E,)
            given = (query, key, value, out, lse), (query, key, value, out), scales
            with span(part.name):
                part.run("forward", *given, named=piece.tables, draws=draws)
            if merged is None:
                merged = out, lse
            else:
                merge_(*merged, out, lse)
        assert merged is not None
        return merged[0].to(query.dtype), merged[1]

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `LayoutKernel.backward`."""
        if not self._is_joint(piece, query):
            return self.gradients(dout, query, key, value, self.row_sums(dout, out, lse, dlse), piece)
        levels, sums = _levels(lse), torch.empty(query.shape, dtype=torch.float32, device=query.device)
        _prepare_rows(dout, out, lse, dlse, levels, sums, abs(piece.scale) * _LOG2_E)
        return self._jointly(dout, query, key, value, levels, sums, piece)

    def gradients(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, row_sums: Tensor, piece: LayoutPiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Adds.gradients`."""
        if not self._is_joint(piece, query):
            draws = self._draws(piece, query, key, backward=True)
            dq = self.gradients_of_queries(dout, query, key, value, row_sums, piece, draws=draws)
            return dq, *self._of_keys("keys", dout, query, key, value, row_sums, piece, draws=draws)
        levels, sums = _levels(row_sums), torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        rows, scale = row_sums.numel(), abs(piece.scale) * _LOG2_E
        grid = (ceil_div(rows, LEVEL_ROWS),)
        launch(gradient_kernels.level_rows, grid, (row_sums, levels), (rows, scale), {"BLOCK_M": LEVEL_ROWS})
        return self._jointly(dout, query, key, value, levels, sums, piece)

    def _is_joint(self, piece: LayoutPiece, query: Tensor) -> bool:
        """Whether all gradients are of one launch for each part."""
        is_exact = piece.deterministic or torch.are_deterministic_algorithms_enabled()
        return not is_exact and all("gradients" in part.passes for part in self._parts_of(piece, query))

    def _jointly(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        levels: Tensor,
        sums: Tensor,
        piece: LayoutPiece,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All gradients; that of the queries is added up in `sums`, which are 0 before."""
        dk, dv = self._of_keys("gradients", dout, query, key, value, levels, piece, (sums,))
        return torch.mul(sums, piece.scale, out=torch.empty_like(query, memory_format=torch.contiguous_format)), dk, dv

    def merge(self, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> None:
        """As `Adds.merge`."""
        (part,) = self._parts_of(piece, query)
        query, key, value = self._taken(piece, query, key, value)
        with span(part.name):
            scales = (abs(piece.scale) * _LOG2_E,)
            part.run("forward", (query, key, value, out, lse), (query, key, value, out), scales, adds=True)

    def row_sums(self, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
        """As `Adds.row_sums`: (B, H, S) pairs of float32 as int64, lse in base 2 and delta."""
        stats = torch.empty((*lse.shape, 2), dtype=torch.float32, device=lse.device)
        _prepare_rows(dout, out, lse, dlse, stats, None, 1.0)
        return stats.view(torch.int64).squeeze(-1)

    def gradients_of_queries(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        row_sums: Tensor,
        piece: LayoutPiece,
        dq: Tensor | None = None,
        *,
        draws: Draws = (),
    ) -> Tensor:
        """As `Adds.gradients_of_queries`; with the draws of each part, or none."""
        parts, total = self._parts_of(piece, query), dq
        query, key, value, dout = self._taken(piece, query, key, value, dout)
        scales = abs(piece.scale) * _LOG2_E, piece.scale  # of the queries as they came
        for part, own in zip_longest(parts, draws):
            into = _room(query.shape, _part_dtype(query, parts), query.device, piece) if dq is None else dq
            given = (query, key, value, dout, row_sums, into), (query, key, value, dout, into), scales
            with span(f"{part.name}, gradients of queries"):
                part.run("queries", *given, adds=dq is not None, named=piece.tables, draws=own)
            total = into if total is None or total is into else total.add_(into)
        assert total is not None
        return total if dq is not None else total.to(query.dtype)

    def gradients_of_keys(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, row_sums: Tensor, piece: LayoutPiece
    ) -> tuple[Tensor, Tensor]:
        """As `Adds.gradients_of_keys`."""
        return self._of_keys("keys", dout, query, key, value, row_sums, piece)

    def _of_keys(
        self,
        which: Pass,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        of_rows: Tensor,
        piece: LayoutPiece,
        more: tuple[Tensor, ...] = (),
        draws: Draws = (),
    ) -> tuple[Tensor, Tensor]:
        """dk and dv of a pass, which takes `of_rows` and also writes to `more`."""
        batch, kv_len, kv_heads, head_dim = key.shape
        heads, parts = query.shape[2], self._parts_of(piece, query)
        query, key, value, dout = self._taken(piece, query, key, value, dout)
        scales = abs(piece.scale) * _LOG2_E, abs(piece.scale)
        # Query heads that share a key-value head write apart and are summed after.
        key_dtype = _part_dtype(key, parts) if heads == kv_heads else torch.float32
        sums: list[Tensor] = []
        for part, own in zip_longest(parts, draws):
            shape = batch, kv_len, heads, head_dim
            grads = [_room(shape, key_dtype, key.device, piece) for _ in range(2)]
            strided = (query, key, value, dout, *more, grads[0])
            given = (query, key, value, dout, of_rows, *more, *grads), strided, scales
            with span(f"{part.name}, gradients of {'all' if which == 'gradients' else 'keys'}"):
                part.run(which, *given, named=piece.tables, draws=own)
            sums = [a.add_(b) for a, b in zip(sums, grads, strict=True)] if sums else grads
        dk, dv = sums
        if heads > kv_heads:
            grouped = (batch, kv_len, kv_heads, heads // kv_heads, head_dim)
            dk, dv = (x.view(grouped).sum(3) for x in (dk, dv))
        return dk.to(key.dtype), dv.to(value.dtype)


def _blocks_of(layout: Layout, device: torch.device, packing: Packing | None, *, apart: bool) -> Blocks | None:
    """The blocks of a layout, if it has any, for all documents of a packing; their occurrences apart."""
    if packing is not None and layout.blocks is not None:
        return packed_blocks(layout.blocks, packing, device, apart=apart)
    pattern = layout.pattern.unwrap()
    if isinstance(pattern, LearnedPattern):
        return NamedBlocks.of(pattern, layout.geometry, device)
    return None if layout.blocks is None else KnownBlocks.of(layout.blocks, device, apart=apart)


def _levels(rows: Tensor) -> Tensor:
    """Room for the levels of rows (B, H, S)."""
    shape = (*rows.shape, gradient_kernels.LEVEL_COLUMNS.value)
    return torch.empty(shape, dtype=torch.bfloat16, device=rows.device)


def _prepare_rows(
    dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, kept: Tensor, sums: Tensor | None, scale: float
) -> None:
    """Keep of rows what their gradients take: as pairs, or where there are sums in levels, for this scale."""
    batch, length, heads, head_dim = out.shape
    dout, out = in_lines(dout), in_lines(out)
    constants = {"HAS_DLSE": dlse is not None, "IN_LEVELS": sums is not None}
    launch(
        gradient_kernels.prepare_rows,
        (ceil_div(length, STATS_ROWS) * heads, batch),
        (dout, out, lse, lse if dlse is None else dlse.contiguous(), kept, kept if sums is None else sums),
        (*dout.stride()[:3], *out.stride()[:3], length, heads, scale),
        constants | {"HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim), "BLOCK_M": STATS_ROWS},
    )


def _room(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, piece: LayoutPiece, rest: float = 0.0
) -> Tensor:
    """For what is written of a piece; `rest` where it writes nothing, which is outside of documents."""
    if piece.packing is None or piece.packing.covers:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.full(shape, rest, dtype=dtype, device=device)


def _part_dtype(x: Tensor, parts: tuple[Part, ...]) -> torch.dtype:
    """What a part writes: float32 where there are others to be added."""
    return x.dtype if len(parts) == 1 else torch.float32
