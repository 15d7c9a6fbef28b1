"""The Triton kernel for the forward pass over tables of blocks, in one launch.

Letters as in `kernels`. A program takes M rows of one block row of one head and walks the blocks of that row: first
those that count every pair alike, then those with a mask of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .addressing import AS_THEY_ARE, load_columns, load_rows, store_rows, tile_and_head_of_blocks
from .drop_kernels import drawn_of_columns, drawn_of_rows, factors
from .kernels import attend_tile, partial_sums

_INF = tl.constexpr(float("inf"))


@triton.jit
def sequence_of_row(documents, number, q_len, k_len, PACKED: tl.constexpr):
    """Which sequence a program's block row is of: see `packed_blocks`.

    Returns its batch row, the place of its first token in there, which block row of the sequence this is, and how many
    queries and keys the sequence has.
    """
    batch, first, block_row = tl.program_id(1).to(tl.int64), 0, number
    if PACKED:
        place = documents + number * 4
        batch, first, block_row = tl.load(place).to(tl.int64), tl.load(place + 1).to(tl.int64), tl.load(place + 2)
        q_len = tl.load(place + 3)
        k_len = q_len
    return batch, first, block_row, q_len, k_len


@triton.jit
def blocks_of_row(
    head_table, starts, ends, head, block_row, number, numbers, block_rows, batch_tables, IN_ORDER: tl.constexpr
):  # fmt: skip
    """Where the blocks of a block row begin, those of them with a mask, and where they end: see `BlockTables`.

    IN_ORDER blocks with and without a mask are not apart, and end as the program's `number` of so many says.
    """
    table = tl.load(head_table + tl.program_id(1) * batch_tables + head).to(tl.int64)
    if IN_ORDER:
        first = tl.load(starts + table * block_rows + block_row)
        masked, last = first, tl.load(ends + table * numbers + number)
    else:
        place = starts + 2 * (table * block_rows + block_row)
        first, masked, last = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    return first, masked, last


@triton.jit
def row_of_program(
    documents, head_table, starts, ends, num_heads, block_rows, batch_tables, leading, q_len, k_len,
    TILES: tl.constexpr, PACKED: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """Of this program, which is of one of so many tiles of a block row: head, which tile, what `sequence_of_row` says
    of the row, and what `blocks_of_row` does.
    """
    tile, head = tile_and_head_of_blocks(num_heads, leading * TILES)
    number, numbers = tile // TILES, tl.num_programs(0) // num_heads // TILES
    batch, place, block_row, q_len, k_len = sequence_of_row(documents, number, q_len, k_len, PACKED)
    first, masked, last = blocks_of_row(
        head_table, starts, ends, head, block_row, number, numbers, block_rows, batch_tables, IN_ORDER
    )  # fmt: skip
    return head, tile % TILES, batch, place, block_row, q_len, k_len, first, masked, last


@triton.jit
def rows_of_program(
    documents, head_table, starts, ends, num_heads, block_rows, batch_tables, leading, q_len, k_len,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, PACKED: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """Of this program: rows (M,) within the block and of the sequence, and the rest as `row_of_program`."""
    head, tile, batch, place, block_row, q_len, k_len, first, masked, last = row_of_program(
        documents, head_table, starts, ends, num_heads, block_rows, batch_tables, leading, q_len, k_len,
        BLOCK // BLOCK_M, PACKED, IN_ORDER,
    )  # fmt: skip
    inside = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    return inside, block_row * BLOCK + inside, head, batch, place, q_len, k_len, first, masked, last


@triton.jit
def lets_through(masks, mask, inside, column, IS_TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr):
    """Which pairs of rows `inside` (M,) and columns (N,) of a block its mask lets through: see `BlockTables`."""
    words: tl.constexpr = (BLOCK + 31) // 32
    line = (mask * 2 + (1 if IS_TRANSPOSED else 0)) * BLOCK + inside
    word = tl.load(masks + line[:, None] * words + column[None, :] // 32)
    return (word >> (column % 32)[None, :]) & 1 != 0


@triton.jit
def met_of_entry(
    masks, mask, inside, within, column, length, IS_TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr,
    IN_ORDER: tl.constexpr,
):  # fmt: skip
    """`lets_through` of a block that has a mask; IN_ORDER others come too, and only so many columns are there."""
    met = lets_through(masks, tl.maximum(mask, 0) if IN_ORDER else mask, inside, within, IS_TRANSPOSED, BLOCK)
    if IN_ORDER:
        met = ((mask < 0) | met) & (column < length)[None, :]
    return met


@triton.jit
def merge(out, lse, out_more, lse_more):
    """Rows (M, D) and their lse (M,) of two sets of keys as those of both; either may have none."""
    top = tl.maximum(lse, lse_more)
    top = tl.where(top == -_INF, 0.0, top)
    share, share_more = tl.exp(lse - top), tl.exp(lse_more - top)
    total = share + share_more
    counted = tl.where(total > 0, total, 1.0)
    out = (out * share[:, None] + out_more * share_more[:, None]) / counted[:, None]
    return out, tl.where(total > 0, top + tl.log(counted), -_INF)


@triton.jit(do_not_specialize=AS_THEY_ARE)
def attend_blocks(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, head_table, starts, cols, biases, mask_ids, masks, ends, documents, draws,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, q_len, k_len, scale, num_heads, group_heads, block_rows, batch_tables, leading,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ADDS: tl.constexpr, PACKED: tl.constexpr,
    IN_ORDER: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Out and lse of a tile of queries of one head, merged into what is there if ADDS: grid (tiles * heads, batch)."""
    length = q_len
    inside, row, head, batch, place, q_len, k_len, first, masked, last = rows_of_program(
        documents, head_table, starts, ends, num_heads, block_rows, batch_tables, leading, q_len, k_len,
        BLOCK, BLOCK_M, PACKED, IN_ORDER,
    )  # fmt: skip
    valid = row < q_len
    q_base = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh + place * stride_qs
    k_base = k_ptr + batch * stride_kb + (head // group_heads).to(tl.int64) * stride_kh + place * stride_ks
    v_base = v_ptr + batch * stride_vb + (head // group_heads).to(tl.int64) * stride_vh + place * stride_vs
    q = load_rows(q_base, row, stride_qs, valid, HEAD_DIM, BLOCK_D)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M, 8], tl.float32)
    row_max = tl.full([BLOCK_M], -_INF, tl.float32)
    row_place = (batch * num_heads + head) * length + place + row
    drops = 0
    if DROPS:
        drops = drawn_of_rows(draws, place + row, valid, place, batch * num_heads + head, False)
    offset = tl.arange(0, BLOCK_N)
    parts: tl.constexpr = BLOCK // BLOCK_N
    for step in range((masked - first) * parts):
        entry = first + step // parts
        column = tl.load(cols + entry) * BLOCK + (step % parts) * BLOCK_N + offset
        out, row_sum, row_max = attend_tile(
            q, k_base, v_base, stride_ks, stride_vs, column, offset, offset, False, out, row_sum, row_max, scale,
            tl.load(biases + entry), drops, HEAD_DIM, BLOCK_D, False, PRECISION, WIDE, DROPS,
        )  # fmt: skip
    for step in range((last - masked) * parts):
        entry = masked + step // parts
        within = (step % parts) * BLOCK_N + offset
        seen = tl.load(cols + entry) * BLOCK + within
        column = tl.minimum(seen, k_len - 1)
        k = load_columns(k_base, column, stride_ks, HEAD_DIM, BLOCK_D, WIDE)
        bias = tl.load(biases + entry)
        scores = tl.dot(q, k.trans(), input_precision=PRECISION) * scale + (0.0 if DROPS else bias)
        met = met_of_entry(masks, tl.load(mask_ids + entry), inside, within, seen, k_len, False, BLOCK, IN_ORDER)
        scores = tl.where(met, scores, -_INF)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        shift = tl.where(new_max == -_INF, 0.0, new_max)
        p = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(row_max - shift)
        row_sum = row_sum * shrink[:, None] + partial_sums(p)
        row_max = new_max
        if DROPS:
            p *= factors(drops, drawn_of_columns(drops, column, bias, WIDE))
        v = load_columns(v_base, column, stride_vs, HEAD_DIM, BLOCK_D, WIDE)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    row_sum = tl.sum(row_sum, 1)
    counted = tl.where(row_sum > 0, row_sum, 1.0)  # rows without keys: out 0, lse -inf
    lse = tl.where(row_sum > 0, row_max + tl.log2(counted), -_INF) * 0.6931471805599453
    out /= counted[:, None]
    o_base = out_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh + place * stride_os
    lse_place = lse_ptr + row_place
    if ADDS:
        if last > first:
            there = load_rows(o_base, row, stride_os, valid, HEAD_DIM, BLOCK_D).to(tl.float32)
            out, lse = merge(there, tl.load(lse_place, mask=valid, other=0.0), out, lse)
            store_rows(o_base, row, stride_os, valid, out, HEAD_DIM, BLOCK_D)
            tl.store(lse_place, lse, mask=valid)
    else:
        store_rows(o_base, row, stride_os, valid, out, HEAD_DIM, BLOCK_D)
        tl.store(lse_place, lse, mask=valid)
