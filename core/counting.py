"""Exact numbers of pairs of a layout, from its structure: nothing here grows with q_len * kv_len.

The distinct pairs of overlapping branches follow by inclusion and exclusion. Pairs common to several branches lie in
cells (the common refinement of the branches' segments) and have, in each cell, one residue modulo the strides' least
common multiple, so a set of branches is described like a single one: cells, a stride and a residue per cell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import TYPE_CHECKING

import attrs
import numpy as np

from .blocking import group_rows
from .checks import MOST_POSITIONS
from .geometry import Geometry
from .layout import BlockLayout, Layout
from .pattern import Branch
from .supports import branch_counts, branch_signature, ranges

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .bands import Band
    from .documents import Packing
    from .pattern import IntArray


def allowed_pairs(geometry: Geometry) -> int:
    """Pairs over all heads that causality allows."""
    return branch_pairs(Branch(None, 1, (0,) * geometry.num_heads), geometry)


@attrs.frozen(eq=False)
class _Cells:
    """Pairs of positions of one cell low:high that are both congruent to `residue` modulo `stride`; arrays (cells,)."""

    low: IntArray
    high: IntArray
    stride: int
    residue: IntArray

    def pairs(self, geometry: Geometry) -> int:
        """How many such pairs the geometry allows."""
        keys = geometry.kv_offset, geometry.kv_offset + geometry.kv_len
        queries = geometry.q_offset, geometry.q_offset + geometry.q_len
        return int(self.each(*queries, *keys, is_causal=geometry.is_causal).sum())

    def queries(self, geometry: Geometry) -> int:
        """How many queries are at such positions."""
        return int(self._places(geometry.q_offset, geometry.q_offset + geometry.q_len)[1].sum())

    def each(
        self,
        q_low: int | IntArray,
        q_high: int | IntArray,
        k_low: int | IntArray,
        k_high: int | IntArray,
        *,
        is_causal: bool,
    ) -> IntArray:
        """How many of each cell have their query in q_low:q_high and their key in k_low:k_high; bounds also by cell."""
        q_first, q_count = self._places(q_low, q_high)
        k_first, k_count = self._places(k_low, k_high)
        if not is_causal:
            return q_count * k_count
        # Query i of a cell sees key j where q_first + i >= k_first + j: min(max(lead + i, 0), k_count) keys.
        lead = q_first - k_first + 1
        return _ramp(lead + q_count, k_count) - _ramp(lead, k_count)

    def _places(self, low: int | IntArray, high: int | IntArray) -> tuple[IntArray, IntArray]:
        """The first place (position = residue + stride * place) from `low` on in each cell; how many before `high`."""
        low, high = np.maximum(self.low, low), np.minimum(self.high, high)
        first = -((self.residue - low) // self.stride)
        end = -((self.residue - high) // self.stride)
        return first, np.maximum(end - first, 0)


def _ramp(upper: IntArray, cap: IntArray) -> IntArray:
    """The sum of min(max(x, 0), cap) over all integers x < upper."""
    rising = np.clip(upper, 0, cap + 1)
    result: IntArray = rising * (rising - 1) // 2 + np.maximum(upper - cap - 1, 0) * cap
    return result


def _cells(branch: Branch, offset: int, geometry: Geometry) -> _Cells:
    """The positions of `branch` at `offset`: a cell for every segment that holds a query and a key."""
    w, r = branch.segment_length, branch.stride
    starts = {"query": geometry.q_offset, "key": geometry.kv_offset}
    ends = {"query": geometry.q_offset + geometry.q_len, "key": geometry.kv_offset + geometry.kv_len}
    if not geometry.q_len or not geometry.kv_len or (w is not None and offset >= w):
        none = np.zeros(0, dtype=np.int64)
        return _Cells(none, none, r, none)
    if w is None:
        low, high = np.array([min(starts.values())]), np.array([max(ends.values())])
        return _Cells(low, high, r, np.array([offset % r]))
    first, last = geometry.segments(w)
    low = np.arange(first, last + 1, dtype=np.int64) * w
    return _Cells(low, low + w, r, (low + offset) % r)


def _by_offset(branches: Sequence[Branch], num_heads: int) -> dict[tuple[int | None, ...], int]:
    """Heads with the same offsets in all branches are alike: how many there are of each kind."""
    kinds: dict[tuple[int | None, ...], int] = {}
    for head in range(num_heads):
        key = tuple(branch.offsets[head] for branch in branches)
        kinds[key] = kinds.get(key, 0) + 1
    return kinds


def branch_pairs(branch: Branch, geometry: Geometry) -> int:
    """Counted pairs of one branch over all heads, its weight included."""
    kinds = _by_offset((branch,), geometry.num_heads)
    return branch.weight * sum(
        heads * _cells(branch, offset, geometry).pairs(geometry)
        for (offset,), heads in kinds.items()
        if offset is not None
    )


def packing_pairs(branches: Sequence[Branch], packing: Packing, *, is_causal: bool) -> int:
    """Counted pairs of all documents, each with positions and a pattern of its own, over all heads."""
    _, _, q_len, _, kv_len = packing.places.T
    total = 0
    for branch in branches:
        width = branch.segment_length or MOST_POSITIONS
        first = (kv_len - q_len) // width
        counts = (kv_len - 1) // width - first + 1
        document, low = np.repeat(np.arange(len(counts)), counts), ranges(first, counts) * width
        kinds = [offset for offset in branch.offsets if offset is not None and offset < width]
        offsets, heads = np.unique(np.array(kinds, dtype=np.int64), return_counts=True)
        cells = _Cells(low, low + width, branch.stride, (low + offsets[:, None]) % branch.stride)
        end = kv_len[document]
        pairs = cells.each(end - q_len[document], end, 0, end, is_causal=is_causal)
        total += branch.weight * int(heads @ pairs.sum(axis=1))
    return total


def shard_pairs(branch: Branch, offset: int, length: int, size: int, *, is_causal: bool) -> IntArray:
    """Pairs of one head's queries in each of `size` shards of `length` positions with keys anywhere, (size,) int64.

    A shard's queries lie in the segment that holds its first position, in the one that holds its last, and in whole
    ones between, which are all alike. The branch's weight is not included.
    """
    seq_len = length * size
    width = branch.segment_length or seq_len
    begin = np.arange(size, dtype=np.int64) * length
    end = begin + length
    if offset >= width:
        return np.zeros(size, dtype=np.int64)

    def within(segment: IntArray, low: IntArray, high: IntArray) -> IntArray:
        """Pairs with a query in low:high, which lies in that segment."""
        start = segment * width
        cells = _Cells(start, np.minimum(start + width, seq_len), branch.stride, (start + offset) % branch.stride)
        return cells.each(low, high, 0, seq_len, is_causal=is_causal)

    first, last = begin // width, (end - 1) // width
    total = within(first, begin, np.minimum(end, (first + 1) * width))
    later = last > first
    total[later] += within(last[later], last[later] * width, end[later])
    whole = last - first > 1
    if whole.any():
        # The residue that positions of a segment have does not change how many of its pairs there are.
        between = (last - first - 1)[whole]
        total[whole] += between * within(np.array([0]), np.array([0]), np.array([width]))
    return total


def distinct_pairs(branches: Sequence[Branch], blocks: BlockLayout | None, geometry: Geometry) -> int:
    """Pairs over all heads that a branch or a block counts at least once."""
    total = _over_heads(branches, geometry, lambda cells: cells.pairs(geometry))
    return total if blocks is None else total + _pairs_beyond(blocks, branches)


def keyless_queries(branches: Sequence[Branch], geometry: Geometry) -> int:
    """Queries over all heads that no branch shows a key; queries and keys are at the same positions.

    So whoever is kept by a branch sees itself.
    """
    kept = _over_heads(branches, geometry, lambda cells: cells.queries(geometry))
    return geometry.q_len * geometry.num_heads - kept


def _over_heads(branches: Sequence[Branch], geometry: Geometry, size: Callable[[_Cells], int]) -> int:
    """The size of what any of the branches has of a head, over all heads."""
    total = 0
    for offsets, heads in _by_offset(branches, geometry.num_heads).items():
        sets = [_cells(b, o, geometry) for b, o in zip(branches, offsets, strict=True) if o is not None]
        total += heads * _union_size(sets, size)
    return total


def _union_size(sets: list[_Cells], size: Callable[[_Cells], int]) -> int:
    """Inclusion and exclusion over the sets, depth first, without the subtrees that cancel.

    Where the common pairs of a choice lie inside a set that is still to be decided, choices with and without that set
    cancel, so nested branches cost their square instead of two to their number.
    """
    sets = sorted(sets, key=lambda cells: cells.stride)
    total = 0
    # The farther set is joined first, so that those between, which often hold the common pairs, are still undecided.
    stack = [(cells, sets[:index:-1], 1) for index, cells in enumerate(sets)]
    while stack:
        common, undecided, sign = stack.pop()
        if any(_within(common, other) for other in undecided):
            continue
        total += sign * size(common)
        for index, other in enumerate(undecided):
            both = _intersection(common, other)
            if both.low.size:
                stack.append((both, undecided[index + 1 :], -sign))
    return total


def _matching(cells: _Cells, other: _Cells) -> NDArray[np.int64]:
    """The cell of `other` that holds each cell's low position; -1 where none does."""
    index = np.searchsorted(other.low, cells.low, side="right") - 1
    if not other.low.size:
        return np.full(cells.low.shape, -1, dtype=np.int64)
    return np.where((index >= 0) & (cells.low < other.high[index]), index, -1)


def _within(cells: _Cells, other: _Cells) -> bool:
    """True where every pair of `cells` is one of `other`."""
    if cells.stride % other.stride:
        return False
    index = _matching(cells, other)
    if (index < 0).any():
        return False
    same = (cells.residue - other.residue[index]) % other.stride == 0
    return bool((same & (cells.high <= other.high[index])).all())


def _intersection(a: _Cells, b: _Cells) -> _Cells:
    """The pairs that both have, cells in ascending order."""
    low = np.union1d(a.low, b.low)
    probe = _Cells(low, low, 1, low)
    in_a, in_b = _matching(probe, a), _matching(probe, b)
    common = gcd(a.stride, b.stride)
    lcm = a.stride // common * b.stride
    kept = (in_a >= 0) & (in_b >= 0)
    low, in_a, in_b = low[kept], in_a[kept], in_b[kept]
    residue_a, residue_b = a.residue[in_a], b.residue[in_b]
    kept = (residue_a - residue_b) % common == 0
    low, in_a, in_b, residue_a, residue_b = (x[kept] for x in (low, in_a, in_b, residue_a, residue_b))
    # Chinese remainder: residue_a + a.stride * t is congruent to residue_b modulo b.stride.
    inverse = pow(a.stride // common, -1, b.stride // common) if b.stride != common else 0
    t = (residue_b - residue_a) // common * inverse % (b.stride // common)
    return _Cells(low, np.minimum(a.high[in_a], b.high[in_b]), lcm, (residue_a + a.stride * t) % lcm)


def block_pairs(blocks: BlockLayout, *, distinct: bool) -> int:
    """Pairs over all query heads that the blocks count, once each or as often as they count."""
    return int(_entry_pairs(blocks, distinct=distinct).sum())


def row_pairs(blocks: BlockLayout) -> IntArray:
    """Pairs that each row of blocks counts over all query heads, each as often as it counts; (rows,) int64."""
    before = np.concatenate([[0], np.cumsum(_entry_pairs(blocks, distinct=False))])
    rows: IntArray = np.diff(before[blocks.row_ptr], axis=1).sum(axis=0)
    return rows


def query_pairs(layout: Layout, last: int, bands: Sequence[Band] = ()) -> IntArray:
    """Pairs that each of the last queries counts of causal self-attention over all heads; (at most `last`,) int64.

    Those of bands, which are in no layout, too.
    """
    length = layout.geometry.q_len
    position = np.arange(max(0, length - last), length, dtype=np.int64)
    found = np.zeros(position.size, dtype=np.int64)
    for branch in layout.branches:
        width = branch.segment_length or MOST_POSITIONS
        place = position % width
        offsets = [offset % branch.stride for offset in branch.offsets if offset is not None and offset < width]
        heads = np.append(np.bincount(offsets), 0)  # of each residue; the last one of those that no head keeps
        residue = np.minimum(place % branch.stride, heads.size - 1)
        found += branch.weight * heads[residue] * (place // branch.stride + 1)
    for band in bands:
        (first, end), (low, high) = band.queries, band.keys
        keys = np.minimum(high, position + min(band.right, 0) + 1) - np.maximum(max(low, 0), position - band.left)
        is_query = (position >= first) & (position < end)
        found += layout.geometry.num_heads * np.where(is_query, np.maximum(keys, 0), 0)
    return found if layout.blocks is None else found + _queries_of_blocks(layout.blocks)[position]


def _queries_of_blocks(blocks: BlockLayout) -> IntArray:
    """Pairs that each query counts over all query heads, each as often as it counts; (q_len,) int64."""
    size, rows, partial = blocks.block_size, entry_rows(blocks), np.flatnonzero(blocks.mask_ids >= 0)
    shared = _heads_of_entries(blocks)
    full = np.zeros((blocks.row_ptr.shape[1] - 1, 1), dtype=np.int64)
    np.add.at(full[:, 0], rows, np.where(blocks.mask_ids >= 0, 0, shared * blocks.weights * size))
    found = np.repeat(full, size, axis=1)
    of_masks = blocks.masks.sum(axis=2, dtype=np.int64)
    np.add.at(found, rows[partial], of_masks[blocks.mask_ids[partial]] * shared[partial, None])
    return found.ravel()[: blocks.geometry.q_len]


def _entry_pairs(blocks: BlockLayout, *, distinct: bool) -> IntArray:
    """`block_pairs` of each entry, (E,) int64."""
    partial = np.flatnonzero(blocks.mask_ids >= 0)
    pairs = _queries(blocks) * blocks.block_size * (1 if distinct else blocks.weights)
    masks = blocks.masks != 0 if distinct else blocks.masks
    pairs[partial] = masks.sum(axis=(1, 2), dtype=np.int64)[blocks.mask_ids[partial]]
    return pairs * _heads_of_entries(blocks)


def _heads_of_entries(blocks: BlockLayout) -> IntArray:
    """How many heads have each entry, (E,) int64."""
    heads: IntArray = np.bincount(blocks.head_table, minlength=blocks.row_ptr.shape[0])
    return heads[entry_tables(blocks)]


def entry_tables(blocks: BlockLayout) -> IntArray:
    """The table of each entry, int64."""
    tables = np.arange(blocks.row_ptr.shape[0], dtype=np.int64)
    return np.repeat(tables, np.diff(blocks.row_ptr[:, [0, -1]], axis=1).ravel())


def entry_rows(blocks: BlockLayout) -> IntArray:
    """The block row of each entry, int64."""
    tables, pointers = blocks.row_ptr.shape
    return np.repeat(np.tile(np.arange(pointers - 1, dtype=np.int64), tables), np.diff(blocks.row_ptr, axis=1).ravel())


def _queries(blocks: BlockLayout) -> IntArray:
    """The number of queries in the block row of each entry, int64."""
    return np.minimum(blocks.geometry.q_len - entry_rows(blocks) * blocks.block_size, blocks.block_size)


def _pairs_beyond(blocks: BlockLayout, branches: Sequence[Branch]) -> int:
    """Pairs over all heads that a block counts and no branch does, by evaluating one block of each kind."""
    if not branches:
        return blocks.distinct_pairs
    geometry, total = blocks.geometry, 0
    rows, queries = entry_rows(blocks), _queries(blocks)
    kinds: dict[tuple[int | None, ...], list[int]] = {}
    for head in range(geometry.num_heads):
        key = (int(blocks.head_table[head]), *(branch.offsets[head] for branch in branches))
        kinds.setdefault(key, []).append(head)
    for (table, *_), heads in kinds.items():
        assert table is not None
        entries = slice(int(blocks.row_ptr[table, 0]), int(blocks.row_ptr[table, -1]))
        query_low = rows[entries] * blocks.block_size + geometry.q_offset
        key_low = blocks.cols[entries].astype(np.int64) * blocks.block_size + geometry.kv_offset
        total += len(heads) * _beyond(
            blocks, branches, heads[0], query_low, key_low, blocks.mask_ids[entries], queries[entries]
        )
    return total


def _beyond(
    blocks: BlockLayout,
    branches: Sequence[Branch],
    head: int,
    query_low: IntArray,
    key_low: IntArray,
    mask_ids: NDArray[np.int32],
    queries: IntArray,
) -> int:
    """`_pairs_beyond` for one head; arrays (entries of its table,)."""
    if not query_low.size:
        return 0
    size = blocks.block_size
    signature = branch_signature(branches, query_low, key_low, size, head)
    own = np.stack([mask_ids.astype(np.int64), queries], axis=-1)
    first, inverse = group_rows(np.concatenate([signature, own], axis=-1))
    often, total = np.bincount(inverse, minlength=first.size), 0
    place = np.arange(size, dtype=np.int64)
    for entry, times in zip(first, often, strict=True):
        inside = place[:, None] < queries[entry]
        counted = inside & (blocks.masks[mask_ids[entry]] != 0) if mask_ids[entry] >= 0 else inside
        taken = branch_counts(branches, query_low[entry] + place[:, None], key_low[entry] + place, head) > 0
        total += int(times) * int((np.broadcast_to(counted, taken.shape) & ~taken).sum())
    return total
