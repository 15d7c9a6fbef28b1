"""The forward pass over branches, in Triton: one launch, and before it one that bounds the scores.

Letters as in `addressing`. Scores are kept in base 2: s = q·k · scale · log2(e) + log2(weight).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .addressing import (
    AS_THEY_ARE,
    load_columns,
    load_rows,
    next_run,
    place_of_runs,
    sequence_of,
    store_rows,
    tile_and_head,
    tile_of_rows,
)
from .drop_kernels import drawn_of_columns, drawn_of_rows, factors

_INF = tl.constexpr(float("inf"))
FIXED_BELOW = tl.constexpr(48.0)  # see `reach`


@triton.jit
def partial_sums(p):
    """Of each row the sums over every eighth column, (M, 8): threads need not ask each other at every step."""
    return tl.sum(tl.reshape(p, [p.shape[0], p.shape[1] // 8, 8]), 1)


@triton.jit
def attend_tile(
    q, k_base, v_base, stride_k, stride_v, rows, index, bound, is_partial, out, row_sum, row_max, scale, bias,
    drops, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax (Milakov and Gimelshein, arXiv 1805.02867) over a tile of columns.

    Where `is_partial`, a row meets only columns whose `index` (N,) is below its `bound` (M,). Where `FIXED`, `row_max`
    is known to be no less than any score without its bias, and stays. Where it DROPS, all count once, and `bias` is
    which occurrence they are: sums are of all, and products of those that are kept. See `drop_kernels`.
    """
    if DROPS:
        of_columns = drawn_of_columns(drops, rows, bias, WIDE)
        bias = 0.0
    k = load_columns(k_base, rows, stride_k, HEAD_DIM, BLOCK_D, WIDE)
    scores = tl.dot(q, k.trans(), input_precision=PRECISION)
    if FIXED:
        p = tl.exp2(scores * scale + (bias - row_max)[:, None])
        if is_partial:
            p = tl.where(index[None, :] < bound[:, None], p, 0.0)
        row_sum += partial_sums(p)
        if DROPS:
            p *= factors(drops, of_columns)
        v = load_columns(v_base, rows, stride_v, HEAD_DIM, BLOCK_D, WIDE)
        return tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION), row_sum, row_max
    if is_partial:
        scores = tl.where(index[None, :] < bound[:, None], scores, -_INF)
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale + bias)
    shift = tl.where(new_max == -_INF, 0.0, new_max)
    p = tl.exp2(scores * scale + (bias - shift)[:, None])
    shrink = tl.exp2(row_max - shift)
    row_sum = row_sum * shrink[:, None] + partial_sums(p)
    if DROPS:
        p *= factors(drops, of_columns)
    v = load_columns(v_base, rows, stride_v, HEAD_DIM, BLOCK_D, WIDE)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return out, row_sum, new_max


@triton.jit
def squared_norms(q):
    """Of rows: (M,) float32."""
    wide = q.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
def reach(squares, largest, scale):
    """What no score of a row exceeds, by Cauchy and Schwarz: |q| max|k| scale (M,), of `squared_norms` of q.

    Below `FIXED_BELOW` it serves as the softmax's maximum: twice that (from the least to the largest score) and the
    24 bits of a float32 lie within its exponents, so that nothing that counts underflows.
    """
    return tl.sqrt(squares * tl.load(largest)) * scale


@triton.jit
def _attend_runs(
    q, k_base, v_base, stride_k, stride_v, runs, total, walks, biases, position, valid, k_low, k_high,
    out, row_sum, row_max, scale, drops,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FIXED: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, SHIFTS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Adds the columns of all runs to the sums of a tile of queries, not yet divided: out, row_sum and row_max."""
    bound = tl.zeros([BLOCK_M], tl.int32)
    offset = tl.arange(0, BLOCK_N)
    begin, step, left, full, bias = 0, 0, 0, 0, 0.0
    for _ in range(total):
        if left <= 0:
            begin, step, left, full, bound, bias = next_run(
                runs, walks, biases, position, valid, k_low, k_high, SHIFTS
            )  # fmt: skip
            runs += 4
        rows = begin + tl.minimum(offset, left - 1) * step
        out, row_sum, row_max = attend_tile(
            q, k_base, v_base, stride_k, stride_v, rows, offset, bound, full < BLOCK_N if SPLIT else True,
            out, row_sum, row_max, scale, bias, drops, HEAD_DIM, BLOCK_D, FIXED, PRECISION, WIDE, DROPS,
        )  # fmt: skip
        begin += BLOCK_N * step
        left -= BLOCK_N
        full -= BLOCK_N
        bound -= BLOCK_N
    return out, row_sum, row_max


@triton.jit(do_not_specialize=AS_THEY_ARE)
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, largest_ptr,
    head_kind, slot_group, slot_index, group_size, group_start, residues, walks, biases, run_start, runs, totals,
    documents, draws, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, q_low, q_high, k_low, k_high, origin, scale, num_heads, group_heads,
    period, groups, most_walks, blocks, block_runs,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, SHIFTS: tl.constexpr, BOUNDED: tl.constexpr,
    PACKED: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """Out and lse of one tile of queries of one head: grid (tiles * heads, batch)."""
    tile, head = tile_and_head(num_heads)
    kind, length = tl.load(head_kind + head), q_high - q_low
    batch, first_row, first_column, q_low, q_high, k_low, k_high, origin = sequence_of(
        documents, tile // period, q_low, q_high, k_low, k_high, origin, BLOCK_M * period, PACKED
    )  # fmt: skip
    table, position, valid = tile_of_rows(
        kind, tile, slot_group, slot_index, group_size, group_start, residues, q_low, q_high, origin, period, groups,
        BLOCK_M,
    )  # fmt: skip
    place, total_place = place_of_runs(kind, tile, run_start, blocks, period, block_runs)
    runs += place
    total = tl.load(totals + total_place)
    q_base = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh + first_row * stride_qs
    k_base = k_ptr + batch * stride_kb + (head // group_heads).to(tl.int64) * stride_kh + first_column * stride_ks
    v_base = v_ptr + batch * stride_vb + (head // group_heads).to(tl.int64) * stride_vh + first_column * stride_vs
    q = load_rows(q_base, position - q_low, stride_qs, valid, HEAD_DIM, BLOCK_D)
    walks += table * most_walks * 9
    biases += table * most_walks
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M, 8], tl.float32)
    row_max = tl.full([BLOCK_M], -_INF, tl.float32)
    row_place = (batch * num_heads + head) * length + first_row + position - q_low
    drops = 0
    if DROPS:
        drops = drawn_of_rows(draws, first_row + position - q_low, valid, first_column, batch * num_heads + head, False)
    if BOUNDED:
        limit = reach(squared_norms(q), largest_ptr + batch * (num_heads // group_heads) + head // group_heads, scale)
        is_bounded = tl.max(limit, 0) < FIXED_BELOW
        # One loop after the other, of which one has no steps: in two branches of an `if` both would have memory.
        row_max = tl.where(is_bounded, limit, row_max)
        out, row_sum, row_max = _attend_runs(
            q, k_base, v_base, stride_ks, stride_vs, runs, tl.where(is_bounded, total, 0), walks, biases,
            position, valid, k_low, k_high, out, row_sum, row_max, scale, drops,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, PRECISION, WIDE, SPLIT, SHIFTS, DROPS,
        )  # fmt: skip
        total = tl.where(is_bounded, 0, total)
    out, row_sum, row_max = _attend_runs(
        q, k_base, v_base, stride_ks, stride_vs, runs, total, walks, biases,
        position, valid, k_low, k_high, out, row_sum, row_max, scale, drops,
        HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, PRECISION, WIDE, SPLIT, SHIFTS, DROPS,
    )  # fmt: skip
    row_sum = tl.sum(row_sum, 1)
    counted = tl.where(row_sum > 0, row_sum, 1.0)  # rows without keys: out 0, lse -inf
    out = out / counted[:, None]
    lse = tl.where(row_sum > 0, row_max + tl.log2(counted), -_INF) * 0.6931471805599453
    o_base = out_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh + first_row * stride_os
    store_rows(o_base, position - q_low, stride_os, valid, out, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + row_place, lse, mask=valid)


@triton.jit(do_not_specialize=AS_THEY_ARE)
def largest_rows(
    x_ptr, largest_ptr, stride_b, stride_s, stride_h, length, num_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The largest squared norm of a row, of each batch row and head, into zeros: grid (tiles * heads, batch)."""
    tile, head, batch = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads, tl.program_id(1).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    base = x_ptr + batch * stride_b + head.to(tl.int64) * stride_h
    x = load_rows(base, row, stride_s, row < length, HEAD_DIM, BLOCK_D).to(tl.float32)
    # As integers, in which non-negative floats are ordered alike, and NaN is past infinity.
    largest = tl.max(tl.sum(x * x, 1).to(tl.int32, bitcast=True), 0)
    tl.atomic_max(largest_ptr + batch * num_heads + head, largest)
