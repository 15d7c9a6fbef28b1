"""Rows that tables of blocks name of other ranks, for many ranks in one table.

Where blocks end wherever shards do, a table over the queries of several ranks and all keys holds the table of each of
them, row for row. Where they do not, one of smaller blocks that do says which blocks hold a pair. n rows, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

from ..core.counting import entry_rows, row_pairs
from ..core.errors import ConfigError
from ..core.layout import ENTRY_BYTES
from ..core.lowering import lower, table_block_size
from ..core.pattern import Pattern
from ..core.supports import ranges
from .census import Lane, lanes_of, terms
from .owners import Owners, positions
from .progressions import BranchRows
from .shards import Shards

if TYPE_CHECKING:
    from ..core.geometry import Geometry
    from ..core.layout import BlockLayout
    from ..core.pattern import IntArray

_BYTES_AT_ONCE: Final = 64 << 20  # of a table over several ranks; lowering and counting it take a few times as many
_MOST_CELLS: Final = 8  # smaller blocks along a block's side; with more of them ranks are faster one by one


@attrs.frozen(eq=False)
class NamedRows:
    """Rows that ranks name of others: of each low:high the positions congruent to `residue` modulo `stride`.

    Attributes:
        rank: who names them, (n,) int64.
        low, high: see above, (n,) int64; none where low >= high.
        stride: see above.
        residue: see above, (n,) integers, or (1,) where all are equal.
        times: how often each counts; negative takes off what others count too much.
    """

    rank: IntArray
    low: IntArray
    high: IntArray
    stride: int
    residue: IntArray
    times: int

    def add_to(self, received: IntArray) -> None:
        """Add to the rows that each rank receives, (R,)."""
        counted = positions(self.low, np.maximum(self.low, self.high), self.stride, self.residue)
        np.add.at(received, self.rank, self.times * counted)

    def add_within(self, owners: Owners, low: int, high: int, times: int = 1) -> None:
        """Add those of positions low:high to the rows that their owners send, so often."""
        bounds = np.maximum(self.low, low), np.minimum(self.high, high)
        owners.add(*bounds, self.stride, self.residue, times * self.times)


@attrs.frozen(eq=False)
class RanksTable:
    """A table over the queries of ranks that follow each other.

    Attributes:
        blocks: the table.
        first: the rank of its first query.
        shards: the cut.
        block_size: of the blocks in which rows are exchanged; a multiple of the table's own.
    """

    blocks: BlockLayout
    first: int
    shards: Shards
    block_size: int

    @property
    def _row_ranks(self) -> IntArray:
        """The rank of each row of blocks, (rows,) int64."""
        rows = np.arange(self.blocks.row_ptr.shape[1] - 1, dtype=np.int64)
        return self.first + rows * self.blocks.block_size // self.shards.length

    def add_pairs(self, pairs: IntArray) -> None:
        """Add to the pairs that each rank's queries count, (R,) int64."""
        np.add.at(pairs, self._row_ranks, row_pairs(self.blocks))

    def rows_beyond(self, branches: BranchRows) -> Iterator[NamedRows]:
        """The rows that the table names and no branch does."""
        for (tables, lanes), heads in self._readers(branches).items():
            rank, low, high = self._columns(tables)
            yield NamedRows(rank, low, high, 1, np.zeros(1, dtype=np.int64), heads)
            if not lanes or not rank.size:
                continue
            stop = int(rank[-1]) + 1
            begins = np.searchsorted(rank, np.arange(self.first, stop + 1))  # of each rank's intervals
            for ranks, start, end, sign, stride, residue in terms(branches, lanes, self.first, stop):
                begin = begins[ranks - self.first]
                counts = begins[ranks - self.first + 1] - begin
                place, of = ranges(begin, counts), np.repeat(np.arange(ranks.size), counts)
                bounds = np.maximum(low[place], start[of]), np.minimum(high[place], end[of])
                residues = residue if residue.size == 1 else residue[of]
                yield NamedRows(rank[place], *bounds, stride, residues, -sign * heads)

    def _readers(self, branches: BranchRows) -> dict[tuple[frozenset[int], tuple[Lane, ...]], int]:
        """Tables and lanes that queries of a key-value head read, and how many such heads read the same."""
        found: dict[tuple[frozenset[int], tuple[Lane, ...]], int] = {}
        group = self.shards.group_size
        for head, kind in enumerate(branches.heads):
            tables = frozenset(self.blocks.head_table[head * group : (head + 1) * group].tolist())
            key = tables, lanes_of(branches, kind)
            found[key] = found.get(key, 0) + 1
        return found

    def _columns(self, tables: frozenset[int]) -> tuple[IntArray, IntArray, IntArray]:
        """Who names, in any of `tables`, positions low:high of other ranks; ascending, blocks that touch as one.

        Blocks are counted from position 0 on before a rank's shard, and from the end of its shard on after it.
        """
        blocks, geometry, length = self.blocks, self.blocks.geometry, self.shards.length
        width = -(-geometry.kv_len // blocks.block_size)
        row_ranks, rows = self._row_ranks, entry_rows(blocks)
        entries = [slice(int(blocks.row_ptr[table, 0]), int(blocks.row_ptr[table, -1])) for table in sorted(tables)]
        codes = np.concatenate([row_ranks[rows[some]] * width + blocks.cols[some] for some in entries])
        rank, col = np.divmod(np.unique(codes), width)
        position = col * blocks.block_size + geometry.kv_offset
        other = np.flatnonzero(position // length != rank)
        rank, position = rank[other], position[other]
        is_after = position // length > rank
        base = np.where(is_after, (rank + 1) * length, 0)
        end = np.where(is_after, self.shards.seq_len, rank * length)
        low = base + (position - base) // self.block_size * self.block_size
        high = np.minimum(low + self.block_size, end)
        touches = (np.diff(rank, prepend=-1) == 0) & (np.concatenate([low[:1], high[:-1]]) >= low)
        starts = np.flatnonzero(~touches)
        return rank[starts], low[starts], high[np.append(starts, low.size)[1:] - 1]


def lowered(
    pattern: Pattern, shards: Shards, ranks: IntArray, *, limit_bytes: int | None = None
) -> Iterator[RanksTable]:
    """Tables that together hold those of `ranks`, ascending (n,).

    As many ranks as follow each other share one, while it stays within `_BYTES_AT_ONCE` and surely none of them needs
    more than `limit_bytes`. Those of a rank alone are the ones that it plans: before, at and after its shard.

    Raises:
        ConfigError: one of a rank alone needs more than `limit_bytes`.
    """
    size = table_block_size(pattern, shards.whole)
    cell = gcd(shards.length, size)
    most = shards.size if size <= _MOST_CELLS * cell else 1
    shared_bytes = _BYTES_AT_ONCE
    if limit_bytes is not None:
        # The masks of whole blocks are others than those of their cells: at worst each cell means one more.
        shared_bytes = min(shared_bytes, limit_bytes if cell == size else limit_bytes // (1 + size**2 // ENTRY_BYTES))
    ends = np.flatnonzero(np.diff(ranks, append=-1) != 1) + 1  # of ranks that follow each other
    begin = 0
    while begin < ranks.size:
        first = int(ranks[begin])
        count = min(most, int(ends[np.searchsorted(ends, begin, side="right")]) - begin)
        if count == 1:
            for part in (shards.against(first, first), *shards.remote(first)):
                yield RanksTable(_table(pattern, part, size, limit_bytes), first, shards, size)
        else:
            try:
                blocks = _table(pattern, shards.together(first, first + count), cell, shared_bytes)
            except ConfigError:  # that of fewer may be small enough; any other fault is raised for one rank
                most = count // 2
                continue
            yield RanksTable(blocks, first, shards, size)
        begin += count


def _table(pattern: Pattern, geometry: Geometry, block_size: int, limit_bytes: int | None) -> BlockLayout:
    blocks = lower(pattern, geometry, block_size=block_size, limit_bytes=limit_bytes).blocks
    assert blocks is not None
    return blocks
