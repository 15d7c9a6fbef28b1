"""Which blocks of a grid hold pairs: from key spans, from branches, and combined over several patterns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np

from .geometry import Geometry, joined_groups
from .layout import BlockGrid, BlockSupport
from .pattern import Branch, KeySpans, Pattern

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .pattern import IntArray


def support_from_spans(pattern: Pattern, grid: BlockGrid, head: int, geometry: Geometry) -> BlockSupport:
    """The blocks that `pattern.key_spans` names, constant where a whole block lies inside a span's inner part.

    Blocks wholly in the future of a causal geometry are left out. Raises `ConfigError` when the grid allows fewer.
    """
    size, first, last = grid.block_size, geometry.kv_offset, geometry.kv_offset + geometry.kv_len
    if not grid.query_low.size or not grid.key_low.size:
        none = np.zeros(0, dtype=np.int64)
        return BlockSupport(none, none, none)
    query_high = np.minimum(grid.query_low + size, geometry.q_offset + geometry.q_len) - 1
    spans = pattern.key_spans(grid.query_low, query_high, head, geometry)
    low, high = np.maximum(spans.low, first), np.minimum(spans.high, last)
    if geometry.is_causal:
        high = np.minimum(high, query_high[:, None] + 1)
    begin, end = (low - first) // size, -((first - high) // size)
    end = np.where(low < high, end, begin)
    # Two spans of a row may meet inside one block; the first lists it, and it is constant for neither.
    begin[:, 1:] = np.maximum(begin[:, 1:], np.maximum.accumulate(end, axis=1)[:, :-1])
    counts = np.maximum(end - begin, 0)
    total = int(counts.sum())
    grid.check_blocks(total)
    row_of_span = np.repeat(np.arange(counts.shape[0], dtype=np.int64), counts.shape[1])
    rows, cols = np.repeat(row_of_span, counts.ravel()), ranges(begin.ravel(), counts.ravel())
    inner_begin, inner_end = -((first - spans.inner_low) // size), (spans.inner_high - first) // size
    inside = cols >= np.repeat(inner_begin.ravel(), counts.ravel())
    inside &= cols < np.repeat(inner_end.ravel(), counts.ravel())
    return BlockSupport(rows, cols, np.where(inside, spans.multiplicity, 0).astype(np.int64))


def ranges(begin: IntArray, counts: IntArray) -> IntArray:
    """begin[i], begin[i] + 1, ..., begin[i] + counts[i] - 1 for every i, one after another."""
    starts = np.cumsum(counts) - counts
    result: IntArray = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(begin - starts, counts)
    return result


def combine_supports(parts: Sequence[BlockSupport], *, is_sum: bool) -> BlockSupport:
    """Blocks that any part lists; constant where every part that lists them is (absent ones count 0).

    A sum adds the constants, a union takes the largest.
    """
    if len(parts) == 1:
        return parts[0]
    width = 1 + max((int(part.cols.max()) for part in parts if part.cols.size), default=0)
    keys = np.concatenate([part.rows * width + part.cols for part in parts])
    order = np.argsort(keys, kind="stable")  # merges the parts, each of which is sorted
    keys, values = keys[order], np.concatenate([part.multiplicity for part in parts])[order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    if not starts.size:
        return BlockSupport(keys, keys, values)
    combined = (np.add if is_sum else np.maximum).reduceat(values, starts)
    combined[np.minimum.reduceat(values, starts) == 0] = 0
    rows, cols = np.divmod(keys[starts], width)
    return BlockSupport(rows, cols, combined)


def support_from_table(
    grid: BlockGrid,
    geometry: Geometry,
    table_size: int,
    table_rows: IntArray,
    row_ptr: IntArray,
    table_cols: IntArray,
    weights: IntArray,
) -> BlockSupport:
    """The blocks of `grid` that touch a listed block of a pattern that is itself defined on blocks.

    Args:
        grid: the blocks asked for, of any size and at any positions.
        geometry: the call.
        table_size: positions in a block of the pattern; its row and column n hold positions n * table_size onwards.
        table_rows: the pattern's rows, ascending; row_ptr (rows + 1,) delimits their columns.
        row_ptr: see table_rows.
        table_cols: listed columns, ascending in each row.
        weights: multiplicity of each listed block where it is constant, else 0.

    Raises:
        ConfigError: when the grid allows fewer blocks.
    """
    size, width = grid.block_size, grid.key_low.size
    if not grid.query_low.size or not width or not table_cols.size:
        none = np.zeros(0, dtype=np.int64)
        return BlockSupport(none, none, none)
    high = np.minimum(grid.query_low + size, geometry.q_offset + geometry.q_len) - 1
    first, last = grid.query_low // table_size, high // table_size
    begin, end = np.searchsorted(table_rows, first), np.searchsorted(table_rows, last, side="right")
    place = ranges(begin, end - begin)  # the table rows that each grid row touches, one after another
    counts = np.diff(row_ptr)[place]
    entry = ranges(row_ptr[place], counts)
    rows = np.repeat(np.repeat(np.arange(first.size), end - begin), counts)
    if size == table_size and geometry.kv_offset % size == 0 and np.array_equal(first, last):  # its blocks are these
        cols = table_cols[entry] - geometry.kv_offset // size
        within = (cols >= 0) & (cols < width)
        if not within.all():
            rows, cols, entry = rows[within], cols[within], entry[within]
        grid.check_blocks(cols.size)
        return BlockSupport(rows, cols, weights[entry])
    low = table_cols[entry] * table_size - geometry.kv_offset
    col_begin, col_end = np.maximum(low // size, 0), np.minimum(-(-(low + table_size) // size), width)
    spread = np.maximum(col_end - col_begin, 0)
    cols, rows = ranges(col_begin, spread), np.repeat(rows, spread)
    low, entry = np.repeat(low, spread), np.repeat(entry, spread)
    inside = (low <= cols * size) & (cols * size + size <= low + table_size) & (first == last)[rows]
    keys, where = np.unique(rows * width + cols, return_index=True)
    grid.check_blocks(keys.size)
    grid_rows, grid_cols = np.divmod(keys, width)
    return BlockSupport(grid_rows, grid_cols, np.where(inside, weights[entry], 0)[where])


def corner_signature(
    query_low: IntArray,
    key_low: IntArray,
    block_size: int,
    table_size: int,
    codes: Callable[[IntArray, IntArray], IntArray],
) -> IntArray:
    """`Pattern.block_signature` of a pattern defined on blocks of `table_size` positions.

    `codes(rows, cols)` tells the pattern's blocks apart, (n,) int64; a negative one is not constant inside. Blocks that
    are larger than the pattern's are all told apart.
    """
    if block_size > table_size or not query_low.size:
        return np.stack([query_low, key_low], axis=-1)
    (rows, row_place), (cols, col_place) = (np.divmod(low, table_size) for low in (query_low, key_low))
    second_row = (query_low + block_size - 1) // table_size
    second_col = (key_low + block_size - 1) // table_size
    if (second_row == rows).all() and (second_col == cols).all():
        corners = [codes(rows, cols)] * 4
    else:
        corners = [codes(r, c) for r in (rows, second_row) for c in (cols, second_col)]
    varies = np.minimum.reduce(corners) < 0
    edges = (
        np.where(varies | (second_row > rows), row_place, -1),
        np.where(varies | (second_col > cols), col_place, -1),
    )
    return np.stack([*corners, *edges]).T


def segment_and_place(position: IntArray, segment_length: int | None) -> tuple[IntArray, IntArray]:
    """The number of each position's segment, and its place in that segment."""
    if segment_length is None:
        return np.zeros_like(position), position
    segment, place = np.divmod(position, segment_length)
    return segment, place


@attrs.frozen(eq=False)
class BranchCounts:
    """How often the branches of one head count pairs of positions.

    Attributes:
        weights: for each segment length and stride the offsets in use, ascending, and their weights, both (n,) int64.
    """

    weights: dict[tuple[int | None, int], tuple[IntArray, IntArray]]

    @classmethod
    def of(cls, branches: Sequence[Branch], head: int) -> BranchCounts:
        """Those of `head`."""
        found: dict[tuple[int | None, int], dict[int, int]] = {}
        for branch in branches:
            offset = branch.offsets[head]
            if offset is not None:
                weights = found.setdefault((branch.segment_length, branch.stride), {})
                weights[offset] = weights.get(offset, 0) + branch.weight
        return cls(
            {
                kind: (np.array(sorted(weights), dtype=np.int64), np.array([weights[o] for o in sorted(weights)]))
                for kind, weights in found.items()
            }
        )

    def __call__(self, query: IntArray, key: IntArray) -> IntArray:
        """For each (query, key) pair of broadcastable positions, before causality; int64."""
        total = np.zeros(np.broadcast_shapes(query.shape, key.shape), dtype=np.int64)
        for (w, r), (offsets, weights) in self.weights.items():
            (q_segment, q_place), (k_segment, k_place) = (segment_and_place(position, w) for position in (query, key))
            residue = q_place % r
            found = np.minimum(np.searchsorted(offsets, residue), offsets.size - 1)
            weight = np.where(offsets[found] == residue, weights[found], 0)
            total += weight * ((q_segment == k_segment) & (residue == k_place % r))
        return total


def branch_reachable(branches: Sequence[Branch] | None, key: IntArray, position: int, head: int) -> NDArray[np.bool_]:
    """`Pattern.reachable` of a sum of branches: kept keys with a kept place at `position` or later in their segment.

    Without branches nothing is known, and every key is kept.
    """
    if branches is None:
        return np.ones(key.shape, dtype=np.bool_)
    reached = np.zeros(key.shape, dtype=np.bool_)
    for branch in branches:
        offset, w, r = branch.offsets[head], branch.segment_length, branch.stride
        if offset is None:
            continue
        segment, place = segment_and_place(key, w)
        kept = (place - offset) % r == 0
        if w is not None:
            kept &= segment * w + (w - 1 - (w - 1 - offset) % r) >= position
        reached |= kept
    return reached


def branch_overlap(
    branches: Sequence[Branch], query_low: IntArray, key_low: IntArray, block_size: int, head: int
) -> NDArray[np.bool_]:
    """False for the blocks in which no query shares a segment with a key, in any branch of `head`."""
    touched = np.zeros(query_low.shape, dtype=np.bool_)
    for branch in branches:
        if branch.offsets[head] is None:
            continue
        w = branch.segment_length
        if w is None:
            return np.ones_like(touched)
        last = block_size - 1
        touched |= ((query_low + last) // w >= key_low // w) & ((key_low + last) // w >= query_low // w)
    return touched


def branch_spans(
    branches: Sequence[Branch], query_low: IntArray, query_high: IntArray, head: int, geometry: Geometry
) -> KeySpans:
    """`Pattern.key_spans` of a sum of branches: one span a block, from the first segment touched to the last.

    Every branch that keeps a query of the block covers the block's own positions, so the spans join to one.
    """
    first, last = geometry.kv_offset, geometry.kv_offset + geometry.kv_len
    low, high = np.full_like(query_low, last), np.full_like(query_low, first)
    alive = [b for b in branches if (o := b.offsets[head]) is not None and (b.segment_length or o + 1) > o]
    for branch in alive:
        w, offset = branch.segment_length, branch.offsets[head]
        assert offset is not None
        q_first, q_last = (segment_and_place(position, w) for position in (query_low, query_high))
        kept = (q_first[0] != q_last[0]) | (q_first[1] + (offset - q_first[1]) % branch.stride <= q_last[1])
        begin = q_first[0] * w if w is not None else np.full_like(low, first)
        end = (q_last[0] + 1) * w if w is not None else np.full_like(low, last)
        low, high = np.where(kept, np.minimum(low, begin), low), np.where(kept, np.maximum(high, end), high)
    inner_low, inner_high, weight = low, low, 1
    if len(alive) == 1 and alive[0].stride == 1:
        w, weight = alive[0].segment_length, alive[0].weight
        inner_high = high if w is None else np.where(query_low // w == query_high // w, high, low)
    return single_span(low, high, inner_low, inner_high, weight)


def single_span(low: IntArray, high: IntArray, inner_low: IntArray, inner_high: IntArray, weight: int = 1) -> KeySpans:
    """Key spans of one interval a block, from arrays of shape (blocks,)."""
    return KeySpans(low[:, None], high[:, None], inner_low[:, None], inner_high[:, None], weight)


def branch_signature_groups(branches: Sequence[Branch], num_heads: int) -> tuple[int, ...]:
    """`Pattern.signature_groups` of a sum of branches: `branch_signature` depends on which branches a head uses."""
    used = [[offset is not None for offset in branch.offsets] for branch in branches]
    return joined_groups([0] * num_heads, *used)


def branch_signature(
    branches: Sequence[Branch], query_low: IntArray, key_low: IntArray, block_size: int, head: int
) -> IntArray:
    """`Pattern.block_signature` of a sum of branches, (blocks, 3 * distinct segment lengths and strides of `head`).

    A block side that lies in one segment is described by its residue, one that straddles a boundary by its place.
    """
    columns: list[IntArray] = []
    alike = {(b.segment_length, b.stride): b for b in branches if b.offsets[head] is not None}
    for (w, r), branch in alike.items():
        codes, segments = [], []
        for low in (query_low, key_low):
            segment, place = segment_and_place(low, w)
            residue = place % r
            codes.append(residue if w is None else np.where(place + block_size <= w, residue, r + place))
            segments.append(segment)
        apart = ~branch_overlap((branch,), query_low, key_low, block_size, head)
        columns += [np.where(apart, -1, code) for code in codes]
        columns.append(np.where(apart, 0, segments[1] - segments[0]))
    return np.stack(columns).T if columns else np.zeros((query_low.size, 0), dtype=np.int64)
