"""Listing the runs of a tile of rows, in Triton: what it meets of each walk in each segment. See `runs`."""

from __future__ import annotations

import triton
import triton.language as tl

from .addressing import (
    AS_THEY_ARE,
    FAR,
    ceil_div,
    columns,
    floor_div,
    place_of_runs,
    sequence_of,
    tile_of_rows,
)


@triton.jit
def _segments(walk, first, last, SHIFTS: tl.constexpr):
    """The first and the last segment of a walk that the rows from `first` to `last` reach into."""
    length, log_length = tl.load(walk), tl.load(walk + 6)
    divisor = tl.maximum(length, 1)
    low = tl.where(length == 0, 0, floor_div(first, divisor, log_length, SHIFTS))
    high = tl.where(length == 0, 0, floor_div(last, divisor, log_length, SHIFTS))
    return low, high


@triton.jit(do_not_specialize=AS_THEY_ARE)
def list_runs(
    slot_group, slot_index, group_size, group_start, residues, walks, counts, run_start, runs, totals,
    documents, low, high, low_column, high_column, origin, period, groups, most_walks, blocks, block_runs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SHIFTS: tl.constexpr, PARTS: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """The runs of one tile of one kind of head, and how many steps of N columns they take: grid (tiles, kinds)."""
    tile, kind = tl.program_id(0), tl.program_id(1)
    _batch, _first, _first_column, low, high, low_column, high_column, origin = sequence_of(
        documents, tile // period, low, high, low_column, high_column, origin, BLOCK_M * period, PACKED
    )  # fmt: skip
    table, position, valid = tile_of_rows(
        kind, tile, slot_group, slot_index, group_size, group_start, residues, low, high, origin, period, groups,
        BLOCK_M,
    )  # fmt: skip
    first = tl.min(tl.where(valid, position, FAR), 0)
    last = tl.max(tl.where(valid, position, -FAR), 0)
    place, total_place = place_of_runs(kind, tile, run_start, blocks, period, block_runs, PARTS)
    runs += place
    total = 0
    if PARTS > 0:
        part = tl.arange(0, PARTS)
        of_parts = tl.zeros([PARTS], tl.int32)
    if first <= last:
        for index in range(tl.load(counts + table)):
            walk = walks + (table * most_walks + index) * 9
            segment_from, segment_to = _segments(walk, first, last, SHIFTS)
            for segment in range(segment_from, segment_to + 1):
                _, _, bound = columns(walk, segment, position, valid, low_column, high_column, SHIFTS)
                count = tl.max(bound, 0)
                if count > 0:
                    tl.store(runs, index)
                    tl.store(runs + 1, segment)
                    tl.store(runs + 2, count)
                    tl.store(runs + 3, tl.min(tl.where(valid, bound, FAR), 0))
                    if PARTS > 0:
                        shape: tl.constexpr = [PARTS, BLOCK_M // PARTS]
                        counts_of_parts = tl.max(tl.reshape(bound, shape), 1)
                        full_of_parts = tl.min(tl.reshape(tl.where(valid, bound, FAR), shape), 1)
                        tl.store(runs + 4 + 2 * part, counts_of_parts)
                        tl.store(runs + 5 + 2 * part, full_of_parts)
                        of_parts += ceil_div(counts_of_parts, BLOCK_N)
                    runs += 4 + 2 * PARTS
                    total += ceil_div(count, BLOCK_N)
    tl.store(totals + total_place, total)
    if PARTS > 0:
        tl.store(totals + total_place + 1 + part, of_parts)
