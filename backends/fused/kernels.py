"""The Triton kernels: one launch forward, and backward one for the gradients of queries and one for keys and values.

Letters: M rows of a tile (queries; keys in `gradients_of_keys`), N columns of a tile, D head_dim. Rows of a tile are
consecutive members of one group of `walks.Tables`; columns are arithmetic progressions, so that a tile of them is a
strided block of memory. Scores are kept in base 2: s = q·k · scale · log2(e) + log2(weight).
"""

from __future__ import annotations

import triton
import triton.language as tl

_FAR = tl.constexpr(1 << 30)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _floor_div(x, y):
    """Floor division by a positive y; Triton's own rounds towards zero."""
    quotient = x // y
    return tl.where(quotient * y > x, quotient - 1, quotient)


@triton.jit
def _ceil_div(x, y):
    """Ceiling division of what is not negative."""
    return (x + y - 1) // y


@triton.jit
def _tile_of_rows(
    head_kind, slot_group, slot_index, group_size, group_start, residues,
    low, high, origin, num_heads, period, groups, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What this program computes, of rows at the positions from `low` up to `high`.

    Returns head, batch row, the place of its group in the tables, the positions (M,) of its rows, ascending, which of
    them are valid, and the first and last that are; the first is past the last where none is.
    """
    tile, head, batch = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads, tl.program_id(1).to(tl.int64)
    kind = tl.load(head_kind + head)
    slot = kind * period + tile % period
    table = kind * groups + tl.load(slot_group + slot)
    size = tl.load(group_size + table)
    start = tl.load(group_start + table)
    element = tl.load(slot_index + slot) * BLOCK_M + tl.arange(0, BLOCK_M)
    residue = tl.load(residues + kind * period + start + element % size)
    position = origin + (tile // period) * BLOCK_M * period + (element // size) * period + residue
    valid = (position >= low) & (position < high)
    first = tl.min(tl.where(valid, position, _FAR), 0)
    last = tl.max(tl.where(valid, position, -_FAR), 0)
    return head, batch, table, position, valid, first, last


@triton.jit
def _segments(walk, first, last):
    """The first and the last segment of a walk that the rows from `first` to `last` reach into."""
    length = tl.load(walk)
    divisor = tl.maximum(length, 1)
    low = tl.where(length == 0, 0, _floor_div(first, divisor))
    high = tl.where(length == 0, 0, _floor_div(last, divisor))
    return low, high


@triton.jit
def _columns(walk, segment, position, valid, low_column, high_column):
    """What a tile of rows walks in one segment: columns first + j * step for 0 <= j < count.

    Within a segment only one end of a row's columns depends on the row, and j counts towards that end: a row meets
    j < bound (M,), and every valid row meets j < full.

    Returns (first, step, count, bound, full).
    """
    length, step, residue, mode = tl.load(walk), tl.load(walk + 1), tl.load(walk + 2), tl.load(walk + 3)
    inner, row_rate = tl.load(walk + 4), tl.load(walk + 5)
    start = tl.where(length == 0, -_FAR, segment * length)
    end = tl.where(length == 0, _FAR, start + length)
    member = (position >= start) & (position < end)
    member &= (row_rate == 0) | ((position - start) % tl.maximum(row_rate, 1) == residue)
    residue += tl.where(row_rate == 0, 0, start)
    low, high = tl.maximum(low_column, start), tl.minimum(high_column, end)
    inner_start = _floor_div(position, inner) * inner
    if (mode == 2) | (mode == 4):  # the row's columns start late: from the end of the segment downwards
        begin = tl.where(mode == 2, position, inner_start + inner)
        offset = high - 1 - residue
        first = high - 1 - (offset - _floor_div(offset, step) * step)
        bound = first - tl.maximum(begin, low)
        factor = -1
    else:
        stop = tl.where(mode == 1, position + 1, tl.where(mode == 3, inner_start, high))
        offset = residue - low
        first = low + offset - _floor_div(offset, step) * step
        bound = tl.minimum(stop, high) - 1 - first
        factor = 1
    bound = tl.where(member & (bound >= 0), bound // step + 1, 0)
    count = tl.max(tl.where(valid, bound, 0), 0)
    full = tl.min(tl.where(valid, bound, _FAR), 0)
    return first, step * factor, count, bound, full


@triton.jit
def _load_rows(base, rows, stride, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (M, D) of one head; zeros where a row is not valid and beyond head_dim."""
    column = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(pointers, mask=valid[:, None] & (column < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _load_columns(base, rows, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Rows (N, D) that all exist; only `WIDE` ones lie 2^31 elements or more from the base."""
    column = tl.arange(0, BLOCK_D)
    if WIDE:
        rows = rows.to(tl.int64)
    pointers = base + (rows[:, None] * stride + column[None, :])
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(column < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(base, rows, stride, valid, x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=valid[:, None] & (column < HEAD_DIM)[None, :])


@triton.jit
def _attend_tile(
    q, k_base, v_base, stride_k, stride_v, rows, index, bound, out, row_sum, row_max, scale, bias,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax (Milakov and Gimelshein, arXiv 1805.02867) over a tile of columns."""
    k = _load_columns(k_base, rows, stride_k, HEAD_DIM, BLOCK_D, WIDE)
    scores = tl.dot(q, k.trans(), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(index[None, :] < bound[:, None], scores, -_INF)
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale + bias)
    shift = tl.where(new_max == -_INF, 0.0, new_max) if MASKED else new_max
    p = tl.exp2(scores * scale + (bias - shift)[:, None])
    shrink = tl.exp2(row_max - shift)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    v = _load_columns(v_base, rows, stride_v, HEAD_DIM, BLOCK_D, WIDE)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return out, row_sum, new_max


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    head_kind, slot_group, slot_index, group_size, group_start, residues, counts, walks, bias_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, q_low, q_high, k_low, k_high, origin, scale, num_heads, group_heads,
    period, groups, most_walks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Out and lse of one tile of queries of one head: grid (tiles * heads, batch)."""
    head, batch, table, position, valid, first, last = _tile_of_rows(
        head_kind, slot_group, slot_index, group_size, group_start, residues,
        q_low, q_high, origin, num_heads, period, groups, BLOCK_M,
    )  # fmt: skip
    if first > last:
        return
    q_base = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh
    k_base = k_ptr + batch * stride_kb + (head // group_heads).to(tl.int64) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // group_heads).to(tl.int64) * stride_vh
    q = _load_rows(q_base, position - q_low, stride_qs, valid, HEAD_DIM, BLOCK_D)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], -_INF, tl.float32)
    offset = tl.arange(0, BLOCK_N)
    for index in range(tl.load(counts + table)):
        walk = walks + (table * most_walks + index) * 6
        bias = tl.load(bias_ptr + table * most_walks + index)
        segment_from, segment_to = _segments(walk, first, last)
        for segment in range(segment_from, segment_to + 1):
            begin, step, count, bound, full = _columns(walk, segment, position, valid, k_low, k_high)
            begin -= k_low
            row = begin + offset * step
            unmasked = full // BLOCK_N if SPLIT else 0
            for _ in range(unmasked):
                out, row_sum, row_max = _attend_tile(
                    q, k_base, v_base, stride_ks, stride_vs,
                    row, offset, bound, out, row_sum, row_max, scale, bias,
                    HEAD_DIM, BLOCK_D, False, PRECISION, WIDE,
                )  # fmt: skip
                row += BLOCK_N * step
            for number in range(unmasked, _ceil_div(count, BLOCK_N)):
                row = begin + tl.minimum(number * BLOCK_N + offset, count - 1) * step
                out, row_sum, row_max = _attend_tile(
                    q, k_base, v_base, stride_ks, stride_vs,
                    row, offset, bound - number * BLOCK_N, out, row_sum, row_max, scale, bias,
                    HEAD_DIM, BLOCK_D, True, PRECISION, WIDE,
                )  # fmt: skip
    counted = tl.where(row_sum > 0, row_sum, 1.0)  # rows without keys: out 0, lse -inf
    out = out / counted[:, None]
    lse = tl.where(row_sum > 0, row_max + tl.log2(counted), -_INF) * 0.6931471805599453
    o_base = out_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh
    _store_rows(o_base, position - q_low, stride_os, valid, out, HEAD_DIM, BLOCK_D)
    lse_base = lse_ptr + (batch * num_heads + head) * (q_high - q_low)
    tl.store(lse_base + position - q_low, lse, mask=valid)


@triton.jit
def prepare_rows(
    dout_ptr, out_ptr, lse_ptr, dlse_ptr, stats_ptr, stride_gb, stride_gs, stride_gh,
    stride_ob, stride_os, stride_oh, length, num_heads,
    HAS_DLSE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Per row its lse in base 2, +inf without keys, and sum(dout * out) - dlse: grid (tiles * heads, batch)."""
    tile, head, batch = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads, tl.program_id(1).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < length
    g_base = dout_ptr + batch * stride_gb + head.to(tl.int64) * stride_gh
    o_base = out_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh
    dout = _load_rows(g_base, row, stride_gs, valid, HEAD_DIM, BLOCK_D).to(tl.float32)
    out = _load_rows(o_base, row, stride_os, valid, HEAD_DIM, BLOCK_D).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    place = (batch * num_heads + head) * length + row
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + place, mask=valid, other=0.0)
    lse = tl.load(lse_ptr + place, mask=valid, other=0.0) * 1.4426950408889634
    tl.store(stats_ptr + 2 * place, tl.where(lse == -_INF, _INF, lse), mask=valid)
    tl.store(stats_ptr + 2 * place + 1, delta, mask=valid)


@triton.jit
def _unpack(pair):
    """The two float32 of an int64: lse in base 2 and delta of a row, which one load brings."""
    lse = pair.to(tl.int32).to(tl.float32, bitcast=True)
    return lse, (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _query_gradient_tile(
    q, dout, lse, delta, dq, k_base, v_base, stride_k, stride_v, rows, index, bound, scale, bias,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Adds a tile of columns to dq: p = exp(s - lse), ds = p * (dout·v - delta), dq += ds·k."""
    k = _load_columns(k_base, rows, stride_k, HEAD_DIM, BLOCK_D, WIDE)
    v = _load_columns(v_base, rows, stride_v, HEAD_DIM, BLOCK_D, WIDE)
    scores = tl.dot(q, k.trans(), input_precision=PRECISION)
    p = tl.exp2(scores * scale + (bias - lse)[:, None])
    if MASKED:
        p = tl.where(index[None, :] < bound[:, None], p, 0.0)
    dp = tl.dot(dout, v.trans(), input_precision=PRECISION)
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return tl.dot(ds, k, dq, input_precision=PRECISION)


@triton.jit
def gradients_of_queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, stats_ptr, dq_ptr,
    head_kind, slot_group, slot_index, group_size, group_start, residues, counts, walks, bias_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    q_low, q_high, k_low, k_high, origin, scale, grad_scale, num_heads, group_heads,
    period, groups, most_walks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one head: grid (tiles * heads, batch)."""
    head, batch, table, position, valid, first, last = _tile_of_rows(
        head_kind, slot_group, slot_index, group_size, group_start, residues,
        q_low, q_high, origin, num_heads, period, groups, BLOCK_M,
    )  # fmt: skip
    if first > last:
        return
    k_base = k_ptr + batch * stride_kb + (head // group_heads).to(tl.int64) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // group_heads).to(tl.int64) * stride_vh
    q_base = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh
    g_base = dout_ptr + batch * stride_gb + head.to(tl.int64) * stride_gh
    q = _load_rows(q_base, position - q_low, stride_qs, valid, HEAD_DIM, BLOCK_D)
    dout = _load_rows(g_base, position - q_low, stride_gs, valid, HEAD_DIM, BLOCK_D)
    place = (batch * num_heads + head) * (q_high - q_low) + position - q_low
    lse, delta = _unpack(tl.load(stats_ptr + place, mask=valid, other=0))
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    offset = tl.arange(0, BLOCK_N)
    for index in range(tl.load(counts + table)):
        walk = walks + (table * most_walks + index) * 6
        bias = tl.load(bias_ptr + table * most_walks + index)
        segment_from, segment_to = _segments(walk, first, last)
        for segment in range(segment_from, segment_to + 1):
            begin, step, count, bound, full = _columns(walk, segment, position, valid, k_low, k_high)
            begin -= k_low
            row = begin + offset * step
            unmasked = full // BLOCK_N if SPLIT else 0
            for _ in range(unmasked):
                dq = _query_gradient_tile(
                    q, dout, lse, delta, dq, k_base, v_base, stride_ks, stride_vs,
                    row, offset, bound, scale, bias,
                    HEAD_DIM, BLOCK_D, False, PRECISION, WIDE,
                )  # fmt: skip
                row += BLOCK_N * step
            for number in range(unmasked, _ceil_div(count, BLOCK_N)):
                row = begin + tl.minimum(number * BLOCK_N + offset, count - 1) * step
                dq = _query_gradient_tile(
                    q, dout, lse, delta, dq, k_base, v_base, stride_ks, stride_vs,
                    row, offset, bound - number * BLOCK_N, scale, bias,
                    HEAD_DIM, BLOCK_D, True, PRECISION, WIDE,
                )  # fmt: skip
    o_base = dq_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh
    _store_rows(o_base, position - q_low, stride_os, valid, dq * grad_scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_gradient_tile(
    k, v, dk, dv, q_base, g_base, stats_base, stride_q, stride_g, rows, index, bound, scale, bias,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Adds a tile of queries to dk and dv; rows are keys, so that everything is transposed."""
    q = _load_columns(q_base, rows, stride_q, HEAD_DIM, BLOCK_D, WIDE)
    dout = _load_columns(g_base, rows, stride_g, HEAD_DIM, BLOCK_D, WIDE)
    lse, delta = _unpack(tl.load(stats_base + rows))
    scores = tl.dot(k, q.trans(), input_precision=PRECISION)
    p = tl.exp2(scores * scale + (bias - lse)[None, :])
    if MASKED:
        p = tl.where(index[None, :] < bound[:, None], p, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dp = tl.dot(v, dout.trans(), input_precision=PRECISION)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    return tl.dot(ds, q, dk, input_precision=PRECISION), dv


@triton.jit
def gradients_of_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, stats_ptr, dk_ptr, dv_ptr,
    head_kind, slot_group, slot_index, group_size, group_start, residues, counts, walks, bias_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    q_low, q_high, k_low, k_high, origin, scale, grad_scale, num_heads, group_heads,
    period, groups, most_walks,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, from the queries of one query head: grid (tiles * query heads, batch)."""
    head, batch, table, position, valid, first, last = _tile_of_rows(
        head_kind, slot_group, slot_index, group_size, group_start, residues,
        k_low, k_high, origin, num_heads, period, groups, BLOCK_M,
    )  # fmt: skip
    if first > last:
        return
    q_base = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh
    g_base = dout_ptr + batch * stride_gb + head.to(tl.int64) * stride_gh
    k_base = k_ptr + batch * stride_kb + (head // group_heads).to(tl.int64) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // group_heads).to(tl.int64) * stride_vh
    k = _load_rows(k_base, position - k_low, stride_ks, valid, HEAD_DIM, BLOCK_D)
    v = _load_rows(v_base, position - k_low, stride_vs, valid, HEAD_DIM, BLOCK_D)
    stats_base = stats_ptr + (batch * num_heads + head) * (q_high - q_low)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    offset = tl.arange(0, BLOCK_N)
    for index in range(tl.load(counts + table)):
        walk = walks + (table * most_walks + index) * 6
        bias = tl.load(bias_ptr + table * most_walks + index)
        segment_from, segment_to = _segments(walk, first, last)
        for segment in range(segment_from, segment_to + 1):
            begin, step, count, bound, full = _columns(walk, segment, position, valid, q_low, q_high)
            begin -= q_low
            row = begin + offset * step
            unmasked = full // BLOCK_N if SPLIT else 0
            for _ in range(unmasked):
                dk, dv = _key_gradient_tile(
                    k, v, dk, dv, q_base, g_base, stats_base, stride_qs, stride_gs,
                    row, offset, bound, scale, bias,
                    HEAD_DIM, BLOCK_D, False, PRECISION, WIDE,
                )  # fmt: skip
                row += BLOCK_N * step
            for number in range(unmasked, _ceil_div(count, BLOCK_N)):
                row = begin + tl.minimum(number * BLOCK_N + offset, count - 1) * step
                dk, dv = _key_gradient_tile(
                    k, v, dk, dv, q_base, g_base, stats_base, stride_qs, stride_gs,
                    row, offset, bound - number * BLOCK_N, scale, bias,
                    HEAD_DIM, BLOCK_D, True, PRECISION, WIDE,
                )  # fmt: skip
    place = batch * stride_ob + head.to(tl.int64) * stride_oh
    _store_rows(dk_ptr + place, position - k_low, stride_os, valid, dk * grad_scale, HEAD_DIM, BLOCK_D)
    _store_rows(dv_ptr + place, position - k_low, stride_os, valid, dv, HEAD_DIM, BLOCK_D)
