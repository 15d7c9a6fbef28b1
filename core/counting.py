"""Exact numbers of pairs of a layout, from its structure: nothing here grows with q_len * kv_len."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from .blocking import group_rows
from .cells import Cells, Steps, cells_of, union_size
from .checks import MOST_POSITIONS
from .geometry import Geometry
from .layout import BlockLayout, Layout
from .pattern import Branch
from .supports import BranchCounts, branch_signature, ranges

_PAIRS_AT_ONCE: Final = 1 << 18  # evaluated in one step: some megabytes of temporaries

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .bands import Band
    from .documents import Packing
    from .pattern import IntArray


def allowed_pairs(geometry: Geometry) -> int:
    """Pairs over all heads that causality allows."""
    return branch_pairs(Branch(None, 1, (0,) * geometry.num_heads), geometry)


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
        heads * cells_of(branch, offset, geometry).pairs(geometry)
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
        cells = Cells(low, low + width, branch.stride, (low + offsets[:, None]) % branch.stride)
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
        cells = Cells(start, np.minimum(start + width, seq_len), branch.stride, (start + offset) % branch.stride)
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


def distinct_pairs(branches: Sequence[Branch], blocks: BlockLayout | None, geometry: Geometry) -> int | None:
    """Pairs over all heads that a branch or a block counts at least once; None where counting them would take long."""
    total = _over_heads(branches, geometry, lambda cells: cells.pairs(geometry))
    if total is None or blocks is None:
        return total
    return total + _pairs_beyond(blocks, branches)


def keyless_queries(branches: Sequence[Branch], geometry: Geometry) -> int | None:
    """Queries over all heads that no branch shows a key; queries and keys are at the same positions.

    So whoever is kept by a branch sees itself. None where counting them would take long.
    """
    kept = _over_heads(branches, geometry, lambda cells: cells.queries(geometry))
    return None if kept is None else geometry.q_len * geometry.num_heads - kept


def _over_heads(branches: Sequence[Branch], geometry: Geometry, size: Callable[[Cells], int]) -> int | None:
    """The size of what any of the branches has of a head, over all heads."""
    total, steps = 0, Steps()
    for offsets, heads in _by_offset(branches, geometry.num_heads).items():
        families: dict[tuple[int | None, int], dict[int, Cells]] = {}
        for branch, offset in zip(branches, offsets, strict=True):
            if offset is not None:
                family = families.setdefault((branch.segment_length, branch.stride), {})
                family[offset] = cells_of(branch, offset, geometry)
        own = union_size([list(family.values()) for family in families.values()], size, steps)
        if own is None:
            return None
        total += heads * own
    return total


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
    place, counts = np.arange(size, dtype=np.int64), BranchCounts.of(branches, head)
    step = max(1, _PAIRS_AT_ONCE // size**2)
    for begin in range(0, first.size, step):
        some = first[begin : begin + step]
        partial = np.flatnonzero(mask_ids[some] >= 0)
        beyond = np.broadcast_to(place[:, None] < queries[some][:, None, None], (some.size, size, size)).copy()
        beyond[partial] &= blocks.masks[mask_ids[some[partial]]] != 0
        query, key = query_low[some][:, None, None] + place[:, None], key_low[some][:, None, None] + place
        beyond &= counts(query, key) == 0
        total += int(often[begin : begin + step] @ beyond.sum(axis=(1, 2)))
    return total
