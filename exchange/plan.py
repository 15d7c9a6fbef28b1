"""What each rank sends, receives and computes for one length: planned once, from the pattern alone. Needs no torch.

The unit of exchange is a *row*: key and value of one position of one key-value head. A row is named by its code,
owner * K * L + head * L + place in the owner's shard, so that sorted codes are sorted by owner and each owner's part is
contiguous. Shapes: L positions in a shard, K key-value heads, U rows received, M rows staged for dense calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

from ..core.layout import BlockLayout, Layout
from ..core.lowering import lower
from ..core.pattern import Pattern
from ..core.schedule import Call, Rows, Schedule, schedule
from .progressions import BranchRows
from .shards import Shards

if TYPE_CHECKING:
    from ..core.geometry import Geometry
    from ..core.pattern import IntArray


# Rows of blocks that share a copy of a staged column. The gradient of a column's keys is computed row after row, and
# alone: a few columns that every row lists, such as those of global tokens, would keep a card from its other work.
ROWS_A_COPY: Final = 32


def row_codes(head: IntArray, position: IntArray, shards: Shards) -> IntArray:
    """The code of each (key-value head, absolute position); broadcastable int64."""
    owner, place = np.divmod(position, shards.length)
    codes: IntArray = (owner * shards.num_kv_heads + head) * shards.length + place
    return codes


@attrs.frozen(eq=False)
class BranchPart:
    """Dense calls of local queries against rows of other ranks, copied call by call into one stage (B, M, 1, D).

    Attributes:
        schedule: the calls; key row i of head t of a call stands at start + t * count + i of the stage.
        sources: of each call, the received rows that it stages, (heads * count,) int64; none twice.
    """

    schedule: Schedule
    sources: tuple[IntArray, ...]

    @property
    def staged(self) -> int:
        """M."""
        return sum(source.size for source in self.sources)


@attrs.frozen(eq=False)
class BlockPart:
    """A table of blocks over the named columns only, which are copied into one stage (B, slots, K, D).

    A column that many rows of blocks list is staged more than once, and its rows share the copies (`ROWS_A_COPY`).

    Attributes:
        layout: the table; its keys are the stage's.
        target: stage rows to be filled, counted over (head, slot), each once, (n,) int64; the others stay 0.
        source: the received rows that fill them, (n,) int64; those of a column with copies repeat.
    """

    layout: BlockLayout
    target: IntArray
    source: IntArray

    @property
    def slots(self) -> int:
        """Key rows of each head in the stage."""
        return self.layout.geometry.kv_len

    @property
    def homes(self) -> Iterator[tuple[IntArray, IntArray]]:
        """Received rows (n,), and the stage rows (n, c) that each of them fills: all of as many copies at once."""
        order = np.argsort(self.source, kind="stable")
        rows, times = np.unique(self.source, return_counts=True)
        for copies in np.unique(times):
            yield rows[times == copies], self.target[order[np.repeat(times, times) == copies]].reshape(-1, copies)


@attrs.frozen(eq=False)
class RankPlan:
    """The exchange and the computation of one rank.

    Attributes:
        shards: the cut.
        rank: whose plan it is.
        local: the pattern over the rank's own keys.
        received: codes of the rows that it receives, ascending, (U,) int64.
        receive_counts: how many of them come from each rank, (R,) int64.
        sent: of each rank, the own rows that go there, counted over (position, head) of the shard; int64.
        branches: dense calls against received rows.
        blocks: tables of blocks over received rows, for the keys before and after the shard.
    """

    shards: Shards
    rank: int
    local: Layout
    received: IntArray
    receive_counts: IntArray
    sent: tuple[IntArray, ...]
    branches: BranchPart
    blocks: tuple[BlockPart, ...]

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        arrays = (self.received, *self.sent, *self.branches.sources)
        blocks = sum(part.layout.nbytes + part.target.nbytes + part.source.nbytes for part in self.blocks)
        return sum(array.nbytes for array in arrays) + self.local.nbytes + self.branches.schedule.nbytes + blocks


def plan_rank(
    pattern: Pattern,
    shards: Shards,
    rank: int,
    *,
    limit_bytes: int | None = None,
    sent: tuple[IntArray, ...] | None = None,
) -> RankPlan:
    """The plan of `rank`.

    Args:
        pattern: who sees whom.
        shards: the cut.
        rank: whose plan.
        limit_bytes: most bytes of a table of blocks.
        sent: `RankPlan.sent`, where it is known; else `sent_rows` finds it.

    Raises:
        ConfigError: a table of blocks needs more than `limit_bytes`.
    """
    sides = tuple(_sides(pattern, shards, rank, limit_bytes))
    received = _named(sides, shards)
    owners = received // (shards.length * shards.num_kv_heads)
    own = shards.against(rank, rank)
    return RankPlan(
        shards=shards,
        rank=rank,
        local=lower(pattern, own, limit_bytes=limit_bytes),
        received=received,
        receive_counts=np.bincount(owners, minlength=shards.size).astype(np.int64),
        sent=sent_rows(pattern, shards, rank, limit_bytes=limit_bytes) if sent is None else sent,
        branches=_branch_part(sides, received, shards),
        blocks=tuple(
            _block_part(side, received, shards) for side in sides if side.blocks is not None and side.blocks.cols.size
        ),
    )


def received_rows(pattern: Pattern, shards: Shards, rank: int, *, limit_bytes: int | None = None) -> IntArray:
    """Codes of the rows of other ranks that the queries of `rank` name, ascending, each once; int64."""
    return _named(tuple(_sides(pattern, shards, rank, limit_bytes)), shards)


def _sides(pattern: Pattern, shards: Shards, rank: int, limit_bytes: int | None) -> Iterator[Layout]:
    for geometry in shards.remote(rank):
        yield lower(pattern, geometry, limit_bytes=limit_bytes)


def sent_rows(pattern: Pattern, shards: Shards, rank: int, *, limit_bytes: int | None = None) -> tuple[IntArray, ...]:
    """Of each rank, the own rows that it names: `RankPlan.sent`.

    For branches nothing is lowered for the others. A block that they list may begin in another shard, and what is drawn
    is drawn for whole rows, so of blocks each rank's table is lowered, whole.
    """
    branches, none = BranchRows.of(pattern, shards), np.zeros(0, dtype=np.int64)
    found = []
    for to in range(shards.size):
        if to == rank or (shards.is_causal and to < rank):
            found.append(none)
        elif branches is not None:
            found.append(branches.named(to, rank))
        else:
            codes = received_rows(pattern, shards, to, limit_bytes=limit_bytes)
            found.append(rows_of(codes, shards, rank))
    return tuple(found)


def rows_of(codes: IntArray, shards: Shards, owner: int) -> IntArray:
    """The rows of `owner` among ascending codes, in their order, counted over (position, head) of its shard; int64."""
    each = shards.length * shards.num_kv_heads
    begin, end = np.searchsorted(codes, (owner * each, (owner + 1) * each))
    head, place = np.divmod(codes[begin:end] - owner * each, shards.length)
    rows: IntArray = place * shards.num_kv_heads + head
    return rows


def _named(sides: Sequence[Layout], shards: Shards) -> IntArray:
    """Codes of all rows that the calls and blocks of `sides` name, ascending, each once."""
    parts = [np.zeros(0, dtype=np.int64)]
    for side in sides:
        parts += [_call_codes(call, side.geometry, shards).ravel() for call in _calls(side)]
        if side.blocks is not None:
            parts += [codes for codes, _ in _column_codes(side.blocks, _columns(side.blocks), shards)]
    return np.unique(np.concatenate(parts))


def _calls(side: Layout) -> tuple[Call, ...]:
    return schedule(side.branches, side.geometry).calls


def _call_codes(call: Call, geometry: Geometry, shards: Shards) -> IntArray:
    """The row that each (segment, head, key) of a call reads, (segments, heads, count)."""
    key = call.key
    segment, head, place = np.ogrid[: call.segments, : key.num_heads, : key.count]
    position = key.start + segment * key.segment_step + place * key.step + head * key.head_shift + geometry.kv_offset
    return row_codes(key.head + head * key.head_step, position, shards)


def _branch_part(sides: Sequence[Layout], received: IntArray, shards: Shards) -> BranchPart:
    calls: list[Call] = []
    sources: list[IntArray] = []
    start = 0
    for side in sides:
        for call in _calls(side):
            codes = _call_codes(call, side.geometry, shards)
            count, heads = call.key.count, call.key.num_heads
            stage = Rows(start, 1, count, heads * count, 0, 0, count, heads)
            calls.append(attrs.evolve(call, key=stage))
            sources.append(np.searchsorted(received, codes.ravel()))
            start += codes.size
    return BranchPart(Schedule(tuple(calls), 0), tuple(sources))


def _columns(blocks: BlockLayout) -> tuple[IntArray, ...]:
    """The columns that each key-value head's queries name, ascending."""
    geometry = blocks.geometry
    tables = [np.unique(blocks.cols[row[0] : row[-1]]).astype(np.int64) for row in blocks.row_ptr]
    group = geometry.group_size
    return tuple(
        np.unique(np.concatenate([tables[t] for t in set(blocks.head_table[head : head + group].tolist())]))
        for head in range(0, geometry.num_heads, group)
    )


def _copied(blocks: BlockLayout, columns: Sequence[IntArray]) -> tuple[IntArray, ...]:
    """`columns`, each as often as it is staged, ascending."""
    times = [np.ones(cols.size, dtype=np.int64) for cols in columns]
    for table, head in _tables(blocks):
        named, rows = np.unique(_entries(blocks, table), return_counts=True)
        place = np.searchsorted(columns[head], named)
        times[head][place] = np.maximum(times[head][place], -(-rows // ROWS_A_COPY))
    return tuple(np.repeat(cols, n) for cols, n in zip(columns, times, strict=True))


def _tables(blocks: BlockLayout) -> list[tuple[int, int]]:
    """Each (table, key-value head) of which query heads read the one at the other."""
    group = blocks.geometry.group_size
    return list(dict.fromkeys((int(table), head // group) for head, table in enumerate(blocks.head_table)))


def _entries(blocks: BlockLayout, table: int) -> IntArray:
    """The columns that a table lists, row after row."""
    pointers = blocks.row_ptr[table]
    entries: IntArray = blocks.cols[pointers[0] : pointers[-1]].astype(np.int64)
    return entries


def _column_codes(
    blocks: BlockLayout, columns: Sequence[IntArray], shards: Shards
) -> Iterator[tuple[IntArray, IntArray]]:
    """For each key-value head the codes of its columns' rows, and the stage slot of each row."""
    size, geometry = blocks.block_size, blocks.geometry
    place = np.arange(size, dtype=np.int64)
    for head, cols in enumerate(columns):
        index = cols[:, None] * size + place
        slot = np.arange(cols.size, dtype=np.int64)[:, None] * size + place
        inside = index < geometry.kv_len
        position = index[inside] + geometry.kv_offset
        yield row_codes(np.array(head, dtype=np.int64), position, shards), slot[inside]


def _block_part(side: Layout, received: IntArray, shards: Shards) -> BlockPart:
    blocks = side.blocks
    assert blocks is not None
    columns = _copied(blocks, _columns(blocks))
    slots = max(cols.size for cols in columns) * blocks.block_size
    targets, sources = [], []
    for head, (codes, slot) in enumerate(_column_codes(blocks, columns, shards)):
        targets.append(head * slots + slot)
        sources.append(np.searchsorted(received, codes))
    layout = _compact(blocks, columns, slots)
    return BlockPart(layout, np.concatenate(targets), np.concatenate(sources))


def _compact(blocks: BlockLayout, columns: Sequence[IntArray], slots: int) -> BlockLayout:
    """The table with its columns renumbered to those that each key-value head has; a table per such head."""
    geometry, tables = blocks.geometry, _tables(blocks)
    cols, entries, row_ptr, begin = [], [], [], 0
    for table, head in tables:
        pointers, listed = blocks.row_ptr[table], _entries(blocks, table)
        entries.append(np.arange(pointers[0], pointers[-1]))
        cols.append(np.searchsorted(columns[head], listed) + _earlier(listed) // ROWS_A_COPY)
        row_ptr.append(pointers - pointers[0] + begin)
        begin += listed.size
    kept = np.concatenate(entries)
    return BlockLayout(
        geometry=attrs.evolve(geometry, kv_len=slots),
        block_size=blocks.block_size,
        head_table=np.array(
            [tables.index((int(t), head // geometry.group_size)) for head, t in enumerate(blocks.head_table)],
            dtype=np.int32,
        ),
        row_ptr=np.stack(row_ptr),
        cols=np.concatenate(cols).astype(np.int32),
        weights=blocks.weights[kept],
        mask_ids=blocks.mask_ids[kept],
        masks=blocks.masks,
    )


def _earlier(values: IntArray) -> IntArray:
    """For each of `values` how many equal ones come before it."""
    order = np.argsort(values, kind="stable")
    sorted_values = values[order]
    found = np.empty(values.size, dtype=np.int64)
    found[order] = np.arange(values.size) - np.searchsorted(sorted_values, sorted_values)
    return found
