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
def _row_positions(
    slot_group, slot_index, group_size, group_start, residues, kind, tile, origin,
    PERIOD: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The group of a tile of rows and their absolute positions (M,), ascending."""
    block = tile // PERIOD
    slot = tile % PERIOD
    group = tl.load(slot_group + kind * PERIOD + slot)
    size = tl.load(group_size + kind * GROUPS + group)
    start = tl.load(group_start + kind * GROUPS + group)
    element = tl.load(slot_index + kind * PERIOD + slot) * BLOCK_M + tl.arange(0, BLOCK_M)
    residue = tl.load(residues + kind * PERIOD + start + element % size)
    return group, origin + block * BLOCK_M * PERIOD + (element // size) * PERIOD + residue


@triton.jit
def _segments(walk, first, last):
    """The first and the last segment of a walk that the rows from `first` to `last` reach into."""
    length = tl.load(walk)
    divisor = tl.maximum(length, 1)
    low = tl.where(length == 0, 0, _floor_div(first, divisor))
    high = tl.where(length == 0, 0, _floor_div(last, divisor))
    return low, high


@triton.jit
def _bounds(walk, segment, position, valid, low_column, high_column):
    """What a tile of rows walks in one segment.

    Within a segment only one end of a row's columns depends on the row. A row meets the columns with
    sign * column < bound, all of them between `first` and `first + (count - 1) * step`; bound is (M,), and so far down
    where the row meets none.

    Returns (sign, bound, first, step, count, full_from, full_to): progression members `full_from` up to `full_to`
    are met by every valid row.
    """
    length, step, residue, mode = tl.load(walk), tl.load(walk + 1), tl.load(walk + 2), tl.load(walk + 3)
    inner, row_rate = tl.load(walk + 4), tl.load(walk + 5)
    start = tl.where(length == 0, -_FAR, segment * length)
    end = tl.where(length == 0, _FAR, start + length)
    member = (position >= start) & (position < end)
    member &= (row_rate == 0) | ((position - start) % tl.maximum(row_rate, 1) == residue)
    residue += tl.where(row_rate == 0, 0, start)
    low_column, high_column = tl.maximum(low_column, start), tl.minimum(high_column, end)
    inner_start = _floor_div(position, inner) * inner
    rises = (mode == 2) | (mode == 4)  # the row's columns start late, not end early
    sign = tl.where(rises, -1, 1)
    if rises:
        low = tl.where(mode == 2, position, inner_start + inner)
        bound = 1 - tl.maximum(low, low_column)
    else:
        high = tl.where(mode == 1, position + 1, tl.where(mode == 3, inner_start, high_column))
        bound = tl.minimum(high, high_column)
    bound = tl.where(member, bound, -_FAR)
    most = tl.max(tl.where(valid, bound, -_FAR), 0)
    least = tl.min(tl.where(valid, bound, _FAR), 0)
    begin = tl.where(rises, 1 - most, low_column)
    end = tl.where(rises, high_column, most)
    offset = residue - begin
    first = begin + offset - _floor_div(offset, step) * step
    count = _ceil_div(tl.maximum(end - first, 0), step)
    full_from = tl.where(rises, tl.minimum(_ceil_div(tl.maximum(1 - least - first, 0), step), count), 0)
    full_to = tl.where(rises, count, tl.minimum(_ceil_div(tl.maximum(least - first, 0), step), count))
    return sign, bound, first, step, count, full_from, full_to


@triton.jit
def _tiles(count, full_from, full_to, BLOCK_N: tl.constexpr):
    """Tiles of columns in all, and the range of those that need no mask."""
    unmasked_from = _ceil_div(full_from, BLOCK_N)
    return _ceil_div(count, BLOCK_N), unmasked_from, tl.maximum(full_to // BLOCK_N, unmasked_from)


@triton.jit
def _seen(number, sign, bound, first, step, count, BLOCK_N: tl.constexpr):
    """Columns (N,) of a tile, the last repeated past the end, and which row meets which, (M, N)."""
    index = number * BLOCK_N + tl.arange(0, BLOCK_N)
    column = first + tl.minimum(index, count - 1) * step
    signed = tl.where(index < count, sign * column, _FAR)
    return column, signed[None, :] < bound[:, None]


@triton.jit
def _load_rows(base, rows, stride, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (M, D) of one head; zeros where a row is not valid and beyond head_dim."""
    column = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(pointers, mask=valid[:, None] & (column < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _pointers(base, rows, stride, BLOCK_D: tl.constexpr):
    """Where rows (N, D) of one head lie."""
    return base + rows.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load_columns(pointers, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows (N, D) that all exist."""
    if HEAD_DIM == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(base, rows, stride, valid, x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=valid[:, None] & (column < HEAD_DIM)[None, :])


@triton.jit
def _attend_tile(
    q, k_pointers, v_pointers, seen, out, row_sum, row_max, scale, bias,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax (Milakov and Gimelshein, arXiv 1805.02867) over a tile of columns."""
    k = _load_columns(k_pointers, HEAD_DIM, BLOCK_D)
    scores = tl.dot(q, k.trans(), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(seen, scores, -_INF)
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale + bias)
    shift = tl.where(new_max == -_INF, 0.0, new_max) if MASKED else new_max
    p = tl.exp2(scores * scale + (bias - shift)[:, None])
    shrink = tl.exp2(row_max - shift)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    v = _load_columns(v_pointers, HEAD_DIM, BLOCK_D)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return out, row_sum, new_max


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    head_kind, slot_group, slot_index, group_size, group_start, residues, counts, walks, bias_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, q_low, q_high, k_low, k_high, origin, scale, num_heads, group_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PERIOD: tl.constexpr, GROUPS: tl.constexpr, WALKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out and lse of one tile of queries of one head: grid (tiles * heads, batch)."""
    tile, head, batch = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads, tl.program_id(1).to(tl.int64)
    kind = tl.load(head_kind + head)
    group, position = _row_positions(
        slot_group, slot_index, group_size, group_start, residues, kind, tile, origin, PERIOD, GROUPS, BLOCK_M
    )
    valid = (position >= q_low) & (position < q_high)
    first = tl.min(tl.where(valid, position, _FAR), 0)
    last = tl.max(tl.where(valid, position, -_FAR), 0)
    if first > last:
        return
    q_base = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh
    k_base = k_ptr + batch * stride_kb + (head // group_heads).to(tl.int64) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // group_heads).to(tl.int64) * stride_vh
    q = _load_rows(q_base, position - q_low, stride_qs, valid, HEAD_DIM, BLOCK_D)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], -_INF, tl.float32)
    table = kind * GROUPS + group
    for index in range(tl.load(counts + table)):
        walk = walks + (table * WALKS + index) * 7
        bias = tl.load(bias_ptr + table * WALKS + index)
        segment_from, segment_to = _segments(walk, first, last)
        for segment in range(segment_from, segment_to + 1):
            sign, bound, begin, step, count, full_from, full_to = _bounds(
                walk, segment, position, valid, k_low, k_high
            )
            tiles, unmasked_from, unmasked_to = _tiles(count, full_from, full_to, BLOCK_N)
            row = begin + (unmasked_from * BLOCK_N + tl.arange(0, BLOCK_N)) * step - k_low
            k_pointers = _pointers(k_base, row, stride_ks, BLOCK_D)
            v_pointers = _pointers(v_base, row, stride_vs, BLOCK_D)
            k_jump = step.to(tl.int64) * BLOCK_N * stride_ks
            v_jump = step.to(tl.int64) * BLOCK_N * stride_vs
            for _ in range(unmasked_from, unmasked_to):
                out, row_sum, row_max = _attend_tile(
                    q, k_pointers, v_pointers,
                    False, out, row_sum, row_max, scale, bias,
                    HEAD_DIM, BLOCK_D, False, PRECISION,
                )  # fmt: skip
                k_pointers += k_jump
                v_pointers += v_jump
            for number in range(tiles - (unmasked_to - unmasked_from)):
                number += tl.where(number >= unmasked_from, unmasked_to - unmasked_from, 0)
                column, seen = _seen(number, sign, bound, begin, step, count, BLOCK_N)
                column -= k_low
                out, row_sum, row_max = _attend_tile(
                    q, _pointers(k_base, column, stride_ks, BLOCK_D), _pointers(v_base, column, stride_vs, BLOCK_D),
                    seen, out, row_sum, row_max, scale, bias,
                    HEAD_DIM, BLOCK_D, True, PRECISION,
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
    dout_ptr, out_ptr, lse_ptr, dlse_ptr, delta_ptr, lse2_ptr, stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    length, num_heads, HAS_DLSE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """sum(dout * out) - dlse of each row, and its lse in base 2, +inf without keys: grid (tiles * heads, batch)."""
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
    tl.store(delta_ptr + place, delta, mask=valid)
    lse = tl.load(lse_ptr + place, mask=valid, other=0.0) * 1.4426950408889634
    tl.store(lse2_ptr + place, tl.where(lse == -_INF, _INF, lse), mask=valid)


@triton.jit
def _query_gradient_tile(
    q, dout, lse, delta, dq, k_pointers, v_pointers, seen, scale, bias,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a tile of columns to dq: p = exp(s - lse), ds = p * (dout·v - delta), dq += ds·k."""
    k = _load_columns(k_pointers, HEAD_DIM, BLOCK_D)
    v = _load_columns(v_pointers, HEAD_DIM, BLOCK_D)
    scores = tl.dot(q, k.trans(), input_precision=PRECISION)
    p = tl.exp2(scores * scale + (bias - lse)[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(dout, v.trans(), input_precision=PRECISION)
    ds = (p * (dp - delta[:, None])).to(k.dtype)
    return tl.dot(ds, k, dq, input_precision=PRECISION)


@triton.jit
def gradients_of_queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    head_kind, slot_group, slot_index, group_size, group_start, residues, counts, walks, bias_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    q_low, q_high, k_low, k_high, origin, scale, grad_scale, num_heads, group_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PERIOD: tl.constexpr, GROUPS: tl.constexpr, WALKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries of one head: grid (tiles * heads, batch)."""
    tile, head, batch = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads, tl.program_id(1).to(tl.int64)
    kind = tl.load(head_kind + head)
    group, position = _row_positions(
        slot_group, slot_index, group_size, group_start, residues, kind, tile, origin, PERIOD, GROUPS, BLOCK_M
    )
    valid = (position >= q_low) & (position < q_high)
    first = tl.min(tl.where(valid, position, _FAR), 0)
    last = tl.max(tl.where(valid, position, -_FAR), 0)
    if first > last:
        return
    k_base = k_ptr + batch * stride_kb + (head // group_heads).to(tl.int64) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // group_heads).to(tl.int64) * stride_vh
    q_base = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh
    g_base = dout_ptr + batch * stride_gb + head.to(tl.int64) * stride_gh
    q = _load_rows(q_base, position - q_low, stride_qs, valid, HEAD_DIM, BLOCK_D)
    dout = _load_rows(g_base, position - q_low, stride_gs, valid, HEAD_DIM, BLOCK_D)
    place = (batch * num_heads + head) * (q_high - q_low) + position - q_low
    lse = tl.load(lse_ptr + place, mask=valid, other=_INF)
    delta = tl.load(delta_ptr + place, mask=valid, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table = kind * GROUPS + group
    for index in range(tl.load(counts + table)):
        walk = walks + (table * WALKS + index) * 7
        bias = tl.load(bias_ptr + table * WALKS + index)
        segment_from, segment_to = _segments(walk, first, last)
        for segment in range(segment_from, segment_to + 1):
            sign, bound, begin, step, count, full_from, full_to = _bounds(
                walk, segment, position, valid, k_low, k_high
            )
            tiles, unmasked_from, unmasked_to = _tiles(count, full_from, full_to, BLOCK_N)
            row = begin + (unmasked_from * BLOCK_N + tl.arange(0, BLOCK_N)) * step - k_low
            k_pointers = _pointers(k_base, row, stride_ks, BLOCK_D)
            v_pointers = _pointers(v_base, row, stride_vs, BLOCK_D)
            k_jump = step.to(tl.int64) * BLOCK_N * stride_ks
            v_jump = step.to(tl.int64) * BLOCK_N * stride_vs
            for _ in range(unmasked_from, unmasked_to):
                dq = _query_gradient_tile(
                    q, dout, lse, delta, dq, k_pointers, v_pointers,
                    False, scale, bias,
                    HEAD_DIM, BLOCK_D, False, PRECISION,
                )  # fmt: skip
                k_pointers += k_jump
                v_pointers += v_jump
            for number in range(tiles - (unmasked_to - unmasked_from)):
                number += tl.where(number >= unmasked_from, unmasked_to - unmasked_from, 0)
                column, seen = _seen(number, sign, bound, begin, step, count, BLOCK_N)
                column -= k_low
                dq = _query_gradient_tile(
                    q, dout, lse, delta, dq, _pointers(k_base, column, stride_ks, BLOCK_D), _pointers(v_base, column, stride_vs, BLOCK_D),
                    seen, scale, bias,
                    HEAD_DIM, BLOCK_D, True, PRECISION,
                )  # fmt: skip
    o_base = dq_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh
    _store_rows(o_base, position - q_low, stride_os, valid, dq * grad_scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_gradient_tile(
    k, v, dk, dv, q_pointers, g_pointers, lse_pointers, delta_pointers, seen, scale, bias,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a tile of queries to dk and dv; rows are keys, so that everything is transposed."""
    q = _load_columns(q_pointers, HEAD_DIM, BLOCK_D)
    dout = _load_columns(g_pointers, HEAD_DIM, BLOCK_D)
    lse, delta = tl.load(lse_pointers), tl.load(delta_pointers)
    scores = tl.dot(k, q.trans(), input_precision=PRECISION)
    p = tl.exp2(scores * scale + (bias - lse)[None, :])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dp = tl.dot(v, dout.trans(), input_precision=PRECISION)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    return tl.dot(ds, q, dk, input_precision=PRECISION), dv


@triton.jit
def gradients_of_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    head_kind, slot_group, slot_index, group_size, group_start, residues, counts, walks, bias_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    q_low, q_high, k_low, k_high, origin, scale, grad_scale, num_heads, group_heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PERIOD: tl.constexpr, GROUPS: tl.constexpr, WALKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, from the queries of one query head: grid (tiles * query heads, batch)."""
    tile, head, batch = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads, tl.program_id(1).to(tl.int64)
    kind = tl.load(head_kind + head)
    group, position = _row_positions(
        slot_group, slot_index, group_size, group_start, residues, kind, tile, origin, PERIOD, GROUPS, BLOCK_M
    )
    valid = (position >= k_low) & (position < k_high)
    first = tl.min(tl.where(valid, position, _FAR), 0)
    last = tl.max(tl.where(valid, position, -_FAR), 0)
    if first > last:
        return
    q_base = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh
    g_base = dout_ptr + batch * stride_gb + head.to(tl.int64) * stride_gh
    k_base = k_ptr + batch * stride_kb + (head // group_heads).to(tl.int64) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // group_heads).to(tl.int64) * stride_vh
    k = _load_rows(k_base, position - k_low, stride_ks, valid, HEAD_DIM, BLOCK_D)
    v = _load_rows(v_base, position - k_low, stride_vs, valid, HEAD_DIM, BLOCK_D)
    lse_base = lse_ptr + (batch * num_heads + head) * (q_high - q_low)
    delta_base = delta_ptr + (batch * num_heads + head) * (q_high - q_low)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table = kind * GROUPS + group
    for index in range(tl.load(counts + table)):
        walk = walks + (table * WALKS + index) * 7
        bias = tl.load(bias_ptr + table * WALKS + index)
        segment_from, segment_to = _segments(walk, first, last)
        for segment in range(segment_from, segment_to + 1):
            sign, bound, begin, step, count, full_from, full_to = _bounds(
                walk, segment, position, valid, q_low, q_high
            )
            tiles, unmasked_from, unmasked_to = _tiles(count, full_from, full_to, BLOCK_N)
            row = begin + (unmasked_from * BLOCK_N + tl.arange(0, BLOCK_N)) * step - q_low
            q_pointers = _pointers(q_base, row, stride_qs, BLOCK_D)
            g_pointers = _pointers(g_base, row, stride_gs, BLOCK_D)
            q_jump = step.to(tl.int64) * BLOCK_N * stride_qs
            g_jump = step.to(tl.int64) * BLOCK_N * stride_gs
            for _ in range(unmasked_from, unmasked_to):
                dk, dv = _key_gradient_tile(
                    k, v, dk, dv, q_pointers, g_pointers,
                    lse_base + row, delta_base + row, False, scale, bias,
                    HEAD_DIM, BLOCK_D, False, PRECISION,
                )  # fmt: skip
                q_pointers += q_jump
                g_pointers += g_jump
                row += BLOCK_N * step
            for number in range(tiles - (unmasked_to - unmasked_from)):
                number += tl.where(number >= unmasked_from, unmasked_to - unmasked_from, 0)
                column, seen = _seen(number, sign, bound, begin, step, count, BLOCK_N)
                column -= q_low
                dk, dv = _key_gradient_tile(
                    k, v, dk, dv, _pointers(q_base, column, stride_qs, BLOCK_D), _pointers(g_base, column, stride_gs, BLOCK_D),
                    lse_base + column, delta_base + column, seen, scale, bias,
                    HEAD_DIM, BLOCK_D, True, PRECISION,
                )  # fmt: skip
    place = batch * stride_ob + head.to(tl.int64) * stride_oh
    _store_rows(dk_ptr + place, position - k_low, stride_os, valid, dk * grad_scale, HEAD_DIM, BLOCK_D)
    _store_rows(dv_ptr + place, position - k_low, stride_os, valid, dv, HEAD_DIM, BLOCK_D)
