"""Where the fused kernels find what they compute: the rows of a tile, the columns of a walk, and their memory.

Parts of kernels, in Triton. Letters: M rows of a tile (queries; keys where their gradients are computed), N columns of
a tile, D head_dim. Rows of a tile are consecutive members of one group of `walks.Tables`; columns are arithmetic
progressions, so that a tile of them is a strided block of memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

FAR = tl.constexpr(1 << 30)
# Numbers that kernels take as they are: one compiled for a length, or for counts of tables, would serve no other.
AS_THEY_ARE = (
    "q_low", "q_high", "k_low", "k_high", "low", "high", "low_column", "high_column", "origin", "period", "groups",
    "most_walks", "blocks", "block_runs", "block_rows", "batch_tables", "leading", "q_len", "k_len", "length",
    "key_rows", "all_rows", "least", "scale_bits", "key_word", "query_word", "occurrence_word", "head_word",
)  # fmt: skip


@triton.jit
def floor_div(x, y, log_y, SHIFTS: tl.constexpr):
    """Floor division by a positive y, by a shift where y is 2^log_y; Triton's own rounds towards zero."""
    if SHIFTS:
        return x >> log_y
    quotient = x // y
    return tl.where(quotient * y > x, quotient - 1, quotient)


@triton.jit
def ceil_div(x, y):
    """Ceiling division of what is not negative."""
    return (x + y - 1) // y


@triton.jit
def tile_and_head(num_heads):
    """Which tile of which head a program computes: one head after another, so that programs at work share its keys."""
    tiles = tl.num_programs(0) // num_heads
    return tl.program_id(0) % tiles, tl.program_id(0) // tiles


@triton.jit
def tile_and_head_of_blocks(num_heads, leading):
    """As `tile_and_head`, but the `leading` tiles of all heads, which have most to do, come before all others."""
    tiles, program = tl.num_programs(0) // num_heads, tl.program_id(0)
    others = program - leading * num_heads
    width = tl.where(others < 0, leading, tiles - leading)
    program = tl.where(others < 0, program, others)
    head = program // width
    return program - head * width + tl.where(others < 0, 0, leading), head


@triton.jit
def sequence_of(
    documents, block, low, high, low_column, high_column, origin, positions, PACKED: tl.constexpr
):  # fmt: skip
    """Which sequence a block of tiles is of, where each has so many `positions`: see `runs.documents_of`.

    Returns its batch row, the places of its first row and its first column in there, the positions from and up to
    which it has rows and columns, and the one that the rows of this block are counted from.
    """
    batch, first, first_column = tl.program_id(1).to(tl.int64), 0, 0
    origin += block * positions
    if PACKED:
        place = documents + block * 8
        batch, first = tl.load(place).to(tl.int64), tl.load(place + 1).to(tl.int64)
        first_column = tl.load(place + 2).to(tl.int64)
        low, high = tl.load(place + 3), tl.load(place + 4)
        low_column, high_column, origin = tl.load(place + 5), tl.load(place + 6), tl.load(place + 7)
    return batch, first, first_column, low, high, low_column, high_column, origin


@triton.jit
def tile_of_rows(
    kind, tile, slot_group, slot_index, group_size, group_start, residues, low, high, origin, period, groups,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The rows of a tile, of those at the positions from `low` up to `high`; its block's are counted from `origin`.

    Returns the place of its group in the tables, the positions (M,) of its rows, ascending, and which are valid.
    """
    slot = kind * period + tile % period
    table = kind * groups + tl.load(slot_group + slot)
    size = tl.load(group_size + table)
    start = tl.load(group_start + table)
    element = tl.load(slot_index + slot) * BLOCK_M + tl.arange(0, BLOCK_M)
    residue = tl.load(residues + kind * period + start + element % size)
    position = origin + (element // size) * period + residue
    return table, position, (position >= low) & (position < high)


@triton.jit
def place_of_runs(kind, tile, run_start, blocks, period, block_runs, PARTS: tl.constexpr = 0):
    """Where the runs of a tile begin, and where its totals stand."""
    block, slot = tile // period, tile % period
    first = (kind * blocks + block).to(tl.int64) * block_runs + tl.load(run_start + kind * period + slot)
    return first * (4 + 2 * PARTS), ((kind * blocks + block) * period + slot) * (1 + PARTS)


@triton.jit
def columns(walk, segment, position, valid, low_column, high_column, SHIFTS: tl.constexpr):
    """What a tile of rows walks in one segment: columns first + j * step for j >= 0, of which a row meets j < bound.

    Within a segment only one end of a row's columns depends on the row, and j counts towards that end. Rows that are
    not valid meet none.

    Returns (first, step, bound (M,)).
    """
    length, step, residue, mode = tl.load(walk), tl.load(walk + 1), tl.load(walk + 2), tl.load(walk + 3)
    inner, row_rate = tl.load(walk + 4), tl.load(walk + 5)
    log_step, log_inner = tl.load(walk + 7), tl.load(walk + 8)
    start = tl.where(length == 0, -FAR, segment * length)
    end = tl.where(length == 0, FAR, start + length)
    member = valid & (position >= start) & (position < end)
    member &= (row_rate == 0) | ((position - start) % tl.maximum(row_rate, 1) == residue)
    residue += tl.where(row_rate == 0, 0, start)
    low, high = tl.maximum(low_column, start), tl.minimum(high_column, end)
    inner_start = floor_div(position, inner, log_inner, SHIFTS) * inner
    if (mode == 2) | (mode == 4):  # the row's columns start late: from the end of the segment downwards
        begin = tl.where(mode == 2, position, inner_start + inner)
        offset = high - 1 - residue
        first = high - 1 - (offset - floor_div(offset, step, log_step, SHIFTS) * step)
        bound = first - tl.maximum(begin, low)
        factor = -1
    else:
        stop = tl.where(mode == 1, position + 1, tl.where(mode == 3, inner_start, high))
        offset = residue - low
        first = low + offset - floor_div(offset, step, log_step, SHIFTS) * step
        bound = tl.minimum(stop, high) - 1 - first
        factor = 1
    bound = tl.where(member & (bound >= 0), floor_div(bound, step, log_step, SHIFTS) + 1, 0)
    return first, step * factor, bound


@triton.jit
def next_run(
    runs, walks, biases, position, valid, low_column, high_column, SHIFTS: tl.constexpr,
):  # fmt: skip
    """The run that stands at `runs` (see `runs`), as the steps over a tile of rows take it.

    Returns its first column, counted from `low_column`, the step to the next, how many columns some row meets and how
    many every row does, how many each row does (M,), and the bias of their scores.
    """
    index, segment, count, full = tl.load(runs), tl.load(runs + 1), tl.load(runs + 2), tl.load(runs + 3)
    first, step, bound = columns(walks + index * 9, segment, position, valid, low_column, high_column, SHIFTS)
    return first - low_column, step, count, full, bound, tl.load(biases + index)


@triton.jit
def in_memory(base, rows, stride, column):
    """Where columns (D,) of rows (M,) are, which begin at multiples of 16 bytes: see `launches.in_lines`.

    By the strides alone Triton would not know that of a head_dim such as 136, and copy number by number.
    """
    return tl.multiple_of(base + (rows[:, None] * stride + column[None, :]), [1, 16])


@triton.jit
def load_rows(base, rows, stride, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (M, D) of one head; zeros where a row is not valid and beyond head_dim."""
    column = tl.arange(0, BLOCK_D)
    pointers = in_memory(base, rows.to(tl.int64), stride, column)
    return tl.load(pointers, mask=valid[:, None] & (column < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def load_columns(base, rows, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Rows (N, D) that all exist; only `WIDE` ones lie 2^31 elements or more from the base."""
    column = tl.arange(0, BLOCK_D)
    if WIDE:
        rows = rows.to(tl.int64)
    pointers = in_memory(base, rows, stride, column)
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(column < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, stride, valid, x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write x (M, D) to rows of one head, in their dtype, where a row is valid."""
    column = tl.arange(0, BLOCK_D)
    pointers = in_memory(base, rows.to(tl.int64), stride, column)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=valid[:, None] & (column < HEAD_DIM)[None, :])
