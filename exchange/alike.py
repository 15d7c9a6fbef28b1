"""What every rank receives, sends and computes of a pattern with tables of blocks: once for ranks that are alike.

Where a pattern repeats itself along the sequence (`Pattern.repeats`), ranks at whole periods from each other name the
same fixed keys, and others at the same distances; a table is lowered for the first of them. Ranks near an end of the
sequence, and all ranks of other patterns, are alike to none. R ranks, n of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm
from typing import TYPE_CHECKING

import attrs
import numpy as np

from ..core.lowering import layout_kinds, lower, table_block_size
from ..core.pattern import Pattern
from .owners import Owners
from .plan import received_rows
from .shards import Shards

if TYPE_CHECKING:
    from ..core.geometry import Geometry
    from ..core.layout import BlockLayout
    from ..core.pattern import IntArray


@attrs.frozen(eq=False)
class BlockTotals:
    """Rows that each rank receives and sends in a forward pass, and pairs that it counts; (R,) int64."""

    received: IntArray
    sent: IntArray
    pairs: IntArray


@attrs.frozen(eq=False)
class _Runs:
    """Positions low:high, whose rows of `heads` key-value heads are named, (n,) int64; no row twice."""

    low: IntArray
    high: IntArray
    heads: IntArray

    @property
    def rows(self) -> int:
        """How many they are."""
        return int(((self.high - self.low) * self.heads).sum())

    def add_to(self, owners: Owners, low: int, high: int, times: int = 1) -> None:
        """Add those of positions low:high, so often."""
        bounds = np.maximum(self.low, low), np.minimum(self.high, high)
        owners.add(*bounds, 1, np.zeros(1, dtype=np.int64), times * self.heads)


def block_totals(pattern: Pattern, shards: Shards, *, limit_bytes: int | None = None) -> BlockTotals:
    """The totals of all ranks.

    Raises:
        ConfigError: a table of blocks needs more than `limit_bytes`.
    """
    owners = Owners(shards.length, shards.size)
    received, pairs = (np.zeros(shards.size, dtype=np.int64) for _ in range(2))
    for ranks, fixed in _alike(pattern, shards):
        first = int(ranks[0])
        runs = _named(pattern, shards, first, limit_bytes)
        received[ranks] = runs.rows
        pairs[ranks] = int(lower(pattern, shards.geometry(first, 0, shards.seq_len), limit_bytes=limit_bytes).pairs)
        if ranks.size == 1:
            runs.add_to(owners, 0, shards.seq_len)
            continue
        runs.add_to(owners, 0, fixed, ranks.size)
        moving = Owners(shards.length, shards.size)
        runs.add_to(moving, fixed, shards.seq_len)
        owners.add_moved(moving.rows, ranks - first)
    return BlockTotals(received, owners.rows, pairs)


def _alike(pattern: Pattern, shards: Shards) -> Iterator[tuple[IntArray, int]]:
    """Ranks (n,) that are alike, ascending, and the position that their fixed keys end before."""
    begin = np.arange(shards.size, dtype=np.int64) * shards.length
    repeats = pattern.unwrap().repeats()
    if repeats is None:
        yield from ((np.array([rank]), 0) for rank in range(shards.size))
        return
    size = table_block_size(pattern, shards.num_heads, shards.num_kv_heads, shards.is_causal)
    fixed = -(-repeats.fixed // size) * size
    # Blocks of fixed keys and others are told apart, and the last block of the sequence is as long as any.
    inside = (begin >= repeats.start) & ((begin - repeats.left) // size * size >= fixed)
    if not shards.is_causal:
        inside &= begin + shards.length + repeats.right + size <= shards.seq_len
    yield from ((np.array([rank]), 0) for rank in np.flatnonzero(~inside))
    ranks = np.flatnonzero(inside)
    _, kind = np.unique(begin[ranks] % lcm(repeats.period, size), return_inverse=True)
    order = np.argsort(kind, kind="stable")
    yield from ((some, fixed) for some in np.split(ranks[order], np.cumsum(np.bincount(kind))[:-1]) if some.size)


def _named(pattern: Pattern, shards: Shards, rank: int, limit_bytes: int | None) -> _Runs:
    """The rows of other ranks that the queries of `rank` name."""
    if "branch" in layout_kinds(pattern, shards.num_heads, shards.num_kv_heads, shards.is_causal):
        codes = received_rows(pattern, shards, rank, limit_bytes=limit_bytes)
        line, place = np.divmod(codes, shards.length)  # of one head in one shard
        starts = np.flatnonzero((np.diff(codes, prepend=-2) > 1) | (place == 0))
        low = line[starts] // shards.num_kv_heads * shards.length + place[starts]
        return _Runs(low, low + np.diff(starts, append=codes.size), np.ones_like(low))
    parts = [_block_runs(pattern, geometry, limit_bytes) for geometry in shards.remote(rank)]
    return _Runs(*np.concatenate([np.zeros((3, 0), dtype=np.int64), *parts], axis=1))


def _block_runs(pattern: Pattern, geometry: Geometry, limit_bytes: int | None) -> IntArray:
    """`_Runs` of the columns that the table of one geometry lists, (3, n)."""
    blocks = lower(pattern, geometry, limit_bytes=limit_bytes).blocks
    assert blocks is not None
    parts = [np.zeros((3, 0), dtype=np.int64)]
    for tables, heads in _readers(blocks).items():
        first, stop = _columns(blocks, tables)
        low, high = first * blocks.block_size, np.minimum(stop * blocks.block_size, geometry.kv_len)
        parts.append(np.stack([low + geometry.kv_offset, high + geometry.kv_offset, np.full_like(low, heads)]))
    return np.concatenate(parts, axis=1)


def _readers(blocks: BlockLayout) -> dict[frozenset[int], int]:
    """The tables that the queries of a key-value head read, and how many such heads read the same."""
    found: dict[frozenset[int], int] = {}
    for head in range(0, blocks.head_table.size, blocks.geometry.group_size):
        tables = frozenset(blocks.head_table[head : head + blocks.geometry.group_size].tolist())
        found[tables] = found.get(tables, 0) + 1
    return found


def _columns(blocks: BlockLayout, tables: frozenset[int]) -> tuple[IntArray, IntArray]:
    """The columns that any of `tables` lists, as runs first:stop, (n,) int64."""
    listed = [blocks.cols[blocks.row_ptr[table, 0] : blocks.row_ptr[table, -1]] for table in sorted(tables)]
    cols = np.unique(np.concatenate(listed)).astype(np.int64)
    ends = np.flatnonzero(np.diff(cols, append=-1) != 1)
    starts = np.flatnonzero(np.diff(cols, prepend=-2) != 1)
    return cols[starts], cols[ends] + 1
