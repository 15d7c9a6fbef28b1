"""The backward pass over branches, in Triton: what is needed of rows, then dq, then dk and dv, a launch each.

Letters as in `kernels`.
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

LEVEL_COLUMNS = tl.constexpr(16)  # the fewest that a product takes
_INF = tl.constexpr(float("inf"))


@triton.jit
def unpack(pair):
    """The two float32 of an int64: lse in base 2 and delta of a row, which one load brings."""
    lse = pair.to(tl.int32).to(tl.float32, bitcast=True)
    return lse, (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _in_three(x):
    """Three bfloat16 whose sum has the 24 bits of x, finite ones of an infinite x."""
    x = tl.clamp(x, -1e30, 1e30, propagate_nan=tl.PropagateNan.ALL)
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _store_levels(levels_ptr, place, valid, lse, delta, scale):
    """What products with ones take off scores and dp: a row of 16 bfloat16 at each place.

    The first three numbers of a row sum to -lse / scale, the next three to -delta, others are 0.
    """
    a, b, c = _in_three(-lse / scale)
    d, e, f = _in_three(-delta)
    column = tl.arange(0, LEVEL_COLUMNS)[None, :]
    levels = tl.where(column < 1, a[:, None], tl.where(column < 2, b[:, None], c[:, None]))
    more = tl.where(column < 4, d[:, None], tl.where(column < 5, e[:, None], f[:, None]))
    levels = tl.where(column < 3, levels, tl.where(column < 6, more, 0.0))
    tl.store(levels_ptr + place.to(tl.int64)[:, None] * LEVEL_COLUMNS + column, levels, mask=valid[:, None])


@triton.jit(do_not_specialize=AS_THEY_ARE)
def prepare_rows(
    dout_ptr, out_ptr, lse_ptr, dlse_ptr, kept_ptr, sums_ptr, stride_gb, stride_gs, stride_gh,
    stride_ob, stride_os, stride_oh, length, num_heads, scale,
    HAS_DLSE: tl.constexpr, IN_LEVELS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Keeps of each row its lse in base 2, +inf without keys, and sum(dout * out) - dlse: grid (tiles * heads, batch).

    As pairs of float32; or IN_LEVELS, and then sums (B, S, H, D) are set to 0 besides.
    """
    tile, head, batch = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads, tl.program_id(1).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < length
    g_base = dout_ptr + batch * stride_gb + head.to(tl.int64) * stride_gh
    o_base = out_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh
    dout = load_rows(g_base, row, stride_gs, valid, HEAD_DIM, BLOCK_D).to(tl.float32)
    out = load_rows(o_base, row, stride_os, valid, HEAD_DIM, BLOCK_D).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    place = (batch * num_heads + head) * length + row
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + place, mask=valid, other=0.0)
    lse = tl.load(lse_ptr + place, mask=valid, other=0.0) * 1.4426950408889634
    lse = tl.where(lse == -_INF, _INF, lse)
    if IN_LEVELS:
        _store_levels(kept_ptr, place, valid, lse, delta, scale)
        s_base = sums_ptr + (batch * length * num_heads + head) * HEAD_DIM
        store_rows(s_base, row, num_heads * HEAD_DIM, valid, tl.zeros_like(out), HEAD_DIM, BLOCK_D)
    else:
        tl.store(kept_ptr + 2 * place, lse, mask=valid)
        tl.store(kept_ptr + 2 * place + 1, delta, mask=valid)


@triton.jit(do_not_specialize=AS_THEY_ARE)
def level_rows(stats_ptr, levels_ptr, length, scale, BLOCK_M: tl.constexpr):
    """Levels, as `prepare_rows` keeps them, of rows that it kept as pairs: grid (tiles,)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < length
    lse, delta = unpack(tl.load(stats_ptr + row, mask=valid, other=0))
    _store_levels(levels_ptr, row, valid, lse, delta, scale)


@triton.jit
def query_gradient_tile(
    q, dout, lse, delta, dq, k_base, v_base, stride_k, stride_v, rows, index, bound, is_partial, scale, bias,
    drops, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    DROPS: tl.constexpr,
):  # fmt: skip
    """Adds a tile of columns to dq: p = exp(s - lse), ds = p * (dout·v - delta), dq += ds·k.

    Where it DROPS, dout·v is times what `factors` says of its pairs; `bias` as in `attend_tile`.
    """
    if DROPS:
        of_columns = drawn_of_columns(drops, rows, bias, WIDE)
        bias = 0.0
    k = load_columns(k_base, rows, stride_k, HEAD_DIM, BLOCK_D, WIDE)
    v = load_columns(v_base, rows, stride_v, HEAD_DIM, BLOCK_D, WIDE)
    scores = tl.dot(q, k.trans(), input_precision=PRECISION)
    p = tl.exp2(scores * scale + (bias - lse)[:, None])
    if is_partial:
        p = tl.where(index[None, :] < bound[:, None], p, 0.0)
    dp = tl.dot(dout, v.trans(), input_precision=PRECISION)
    if DROPS:
        dp *= factors(drops, of_columns)
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return tl.dot(ds, k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=AS_THEY_ARE)
def gradients_of_queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, stats_ptr, dq_ptr,
    head_kind, slot_group, slot_index, group_size, group_start, residues, walks, biases, run_start, runs, totals,
    documents, draws, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    q_low, q_high, k_low, k_high, origin, scale, grad_scale, num_heads, group_heads,
    period, groups, most_walks, blocks, block_runs,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, SHIFTS: tl.constexpr,
    PACKED: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one head: grid (tiles * heads, batch)."""
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
    walks += table * most_walks * 9
    biases += table * most_walks
    k_base = k_ptr + batch * stride_kb + (head // group_heads).to(tl.int64) * stride_kh + first_column * stride_ks
    v_base = v_ptr + batch * stride_vb + (head // group_heads).to(tl.int64) * stride_vh + first_column * stride_vs
    q_base = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh + first_row * stride_qs
    g_base = dout_ptr + batch * stride_gb + head.to(tl.int64) * stride_gh + first_row * stride_gs
    q = load_rows(q_base, position - q_low, stride_qs, valid, HEAD_DIM, BLOCK_D)
    dout = load_rows(g_base, position - q_low, stride_gs, valid, HEAD_DIM, BLOCK_D)
    row = (batch * num_heads + head) * length + first_row + position - q_low
    lse, delta = unpack(tl.load(stats_ptr + row, mask=valid, other=0))
    drops = 0
    if DROPS:
        drops = drawn_of_rows(draws, first_row + position - q_low, valid, first_column, batch * num_heads + head, False)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    bound = tl.zeros([BLOCK_M], tl.int32)
    offset = tl.arange(0, BLOCK_N)
    begin, step, left, full, bias = 0, 0, 0, 0, 0.0
    for _ in range(tl.load(totals + total_place)):
        if left <= 0:
            begin, step, left, full, bound, bias = next_run(
                runs, walks, biases, position, valid, k_low, k_high, SHIFTS
            )  # fmt: skip
            runs += 4
        rows = begin + tl.minimum(offset, left - 1) * step
        dq = query_gradient_tile(
            q, dout, lse, delta, dq, k_base, v_base, stride_ks, stride_vs, rows, offset, bound,
            full < BLOCK_N if SPLIT else True, scale, bias, drops, HEAD_DIM, BLOCK_D, PRECISION, WIDE, DROPS,
        )  # fmt: skip
        begin += BLOCK_N * step
        left -= BLOCK_N
        full -= BLOCK_N
        bound -= BLOCK_N
    o_base = dq_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh + first_row * stride_os
    store_rows(o_base, position - q_low, stride_os, valid, dq * grad_scale, HEAD_DIM, BLOCK_D)


@triton.jit
def key_gradient_tile(
    k, v, dk, dv, q_base, g_base, stats_base, stride_q, stride_g, rows, index, bound, is_partial, scale, bias,
    drops, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    DROPS: tl.constexpr,
):  # fmt: skip
    """Adds a tile of queries to dk and dv; rows are keys, so that everything is transposed.

    Where it DROPS, `bias` is as in `attend_tile`.
    """
    if DROPS:
        of_columns = drawn_of_columns(drops, rows, bias, WIDE)
        bias = 0.0
    q = load_columns(q_base, rows, stride_q, HEAD_DIM, BLOCK_D, WIDE)
    dout = load_columns(g_base, rows, stride_g, HEAD_DIM, BLOCK_D, WIDE)
    lse, delta = unpack(tl.load(stats_base + rows))
    scores = tl.dot(k, q.trans(), input_precision=PRECISION)
    p = tl.exp2(scores * scale + (bias - lse)[None, :])
    if is_partial:
        p = tl.where(index[None, :] < bound[:, None], p, 0.0)
    kept = p
    if DROPS:
        factor = factors(drops, of_columns)
        kept *= factor
    dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dp = tl.dot(v, dout.trans(), input_precision=PRECISION)
    if DROPS:
        dp *= factor
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    return tl.dot(ds, q, dk, input_precision=PRECISION), dv


@triton.jit(do_not_specialize=AS_THEY_ARE)
def gradients_of_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, stats_ptr, dk_ptr, dv_ptr,
    head_kind, slot_group, slot_index, group_size, group_start, residues, walks, biases, run_start, runs, totals,
    documents, draws, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    q_low, q_high, k_low, k_high, origin, scale, grad_scale, num_heads, group_heads,
    period, groups, most_walks, blocks, block_runs,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, SHIFTS: tl.constexpr,
    PACKED: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, from the queries of one query head: grid (tiles * query heads, batch)."""
    tile, head = tile_and_head(num_heads)
    kind, length = tl.load(head_kind + head), q_high - q_low
    batch, first_row, first_column, k_low, k_high, q_low, q_high, origin = sequence_of(
        documents, tile // period, k_low, k_high, q_low, q_high, origin, BLOCK_M * period, PACKED
    )  # fmt: skip
    table, position, valid = tile_of_rows(
        kind, tile, slot_group, slot_index, group_size, group_start, residues, k_low, k_high, origin, period, groups,
        BLOCK_M,
    )  # fmt: skip
    place, total_place = place_of_runs(kind, tile, run_start, blocks, period, block_runs)
    runs += place
    walks += table * most_walks * 9
    biases += table * most_walks
    q_base = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh + first_column * stride_qs
    g_base = dout_ptr + batch * stride_gb + head.to(tl.int64) * stride_gh + first_column * stride_gs
    k_base = k_ptr + batch * stride_kb + (head // group_heads).to(tl.int64) * stride_kh + first_row * stride_ks
    v_base = v_ptr + batch * stride_vb + (head // group_heads).to(tl.int64) * stride_vh + first_row * stride_vs
    k = load_rows(k_base, position - k_low, stride_ks, valid, HEAD_DIM, BLOCK_D)
    v = load_rows(v_base, position - k_low, stride_vs, valid, HEAD_DIM, BLOCK_D)
    stats_base = stats_ptr + (batch * num_heads + head) * length + first_column
    drops = 0
    if DROPS:
        drops = drawn_of_rows(draws, first_row + position - k_low, valid, first_column, batch * num_heads + head, True)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    bound = tl.zeros([BLOCK_M], tl.int32)
    offset = tl.arange(0, BLOCK_N)
    begin, step, left, full, bias = 0, 0, 0, 0, 0.0
    for _ in range(tl.load(totals + total_place)):
        if left <= 0:
            begin, step, left, full, bound, bias = next_run(
                runs, walks, biases, position, valid, q_low, q_high, SHIFTS
            )  # fmt: skip
            runs += 4
        rows = begin + tl.minimum(offset, left - 1) * step
        dk, dv = key_gradient_tile(
            k, v, dk, dv, q_base, g_base, stats_base, stride_qs, stride_gs, rows, offset, bound,
            full < BLOCK_N if SPLIT else True, scale, bias, drops, HEAD_DIM, BLOCK_D, PRECISION, WIDE, DROPS,
        )  # fmt: skip
        begin += BLOCK_N * step
        left -= BLOCK_N
        full -= BLOCK_N
        bound -= BLOCK_N
    place_out = batch * stride_ob + head.to(tl.int64) * stride_oh + first_row * stride_os
    store_rows(dk_ptr + place_out, position - k_low, stride_os, valid, dk * grad_scale, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + place_out, position - k_low, stride_os, valid, dv, HEAD_DIM, BLOCK_D)
