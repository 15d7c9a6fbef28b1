"""The Triton kernels for the backward pass over tables of blocks: a launch for dq, and one for dk and dv.

Rows, blocks and letters as in `block_kernels`; transposed, rows are keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .addressing import AS_THEY_ARE, load_columns, load_rows, store_rows
from .block_kernels import met_of_entry, rows_of_program
from .drop_kernels import drawn_of_columns, drawn_of_rows, factors
from .gradient_kernels import key_gradient_tile, query_gradient_tile, unpack

_INF = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=AS_THEY_ARE)
def block_gradients_of_queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, stats_ptr, dq_ptr, head_table, starts, cols, biases, mask_ids, masks,
    ends, documents, draws,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    q_len, k_len, scale, grad_scale, num_heads, group_heads, block_rows, batch_tables, leading,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ADDS: tl.constexpr, PACKED: tl.constexpr,
    IN_ORDER: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries of one head: grid (tiles * heads, batch); ADDS adds it to what is there."""
    length = q_len
    inside, row, head, batch, place, q_len, k_len, first, masked, last = rows_of_program(
        documents, head_table, starts, ends, num_heads, block_rows, batch_tables, leading, q_len, k_len,
        BLOCK, BLOCK_M, PACKED, IN_ORDER,
    )  # fmt: skip
    valid = row < q_len
    k_base = k_ptr + batch * stride_kb + (head // group_heads).to(tl.int64) * stride_kh + place * stride_ks
    v_base = v_ptr + batch * stride_vb + (head // group_heads).to(tl.int64) * stride_vh + place * stride_vs
    q_base = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh + place * stride_qs
    g_base = dout_ptr + batch * stride_gb + head.to(tl.int64) * stride_gh + place * stride_gs
    q = load_rows(q_base, row, stride_qs, valid, HEAD_DIM, BLOCK_D)
    dout = load_rows(g_base, row, stride_gs, valid, HEAD_DIM, BLOCK_D)
    row_place = (batch * num_heads + head) * length + place + row
    lse, delta = unpack(tl.load(stats_ptr + row_place, mask=valid, other=0))
    drops = 0
    if DROPS:
        drops = drawn_of_rows(draws, place + row, valid, place, batch * num_heads + head, False)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    offset = tl.arange(0, BLOCK_N)
    parts: tl.constexpr = BLOCK // BLOCK_N
    for step in range((masked - first) * parts):
        entry = first + step // parts
        column = tl.load(cols + entry) * BLOCK + (step % parts) * BLOCK_N + offset
        dq = query_gradient_tile(
            q, dout, lse, delta, dq, k_base, v_base, stride_ks, stride_vs, column, offset, offset, False, scale,
            tl.load(biases + entry), drops, HEAD_DIM, BLOCK_D, PRECISION, WIDE, DROPS,
        )  # fmt: skip
    for step in range((last - masked) * parts):
        entry = masked + step // parts
        within = (step % parts) * BLOCK_N + offset
        seen = tl.load(cols + entry) * BLOCK + within
        column = tl.minimum(seen, k_len - 1)
        k = load_columns(k_base, column, stride_ks, HEAD_DIM, BLOCK_D, WIDE)
        v = load_columns(v_base, column, stride_vs, HEAD_DIM, BLOCK_D, WIDE)
        bias = tl.load(biases + entry)
        scores = tl.dot(q, k.trans(), input_precision=PRECISION) * scale + (0.0 if DROPS else bias)
        met = met_of_entry(masks, tl.load(mask_ids + entry), inside, within, seen, k_len, False, BLOCK, IN_ORDER)
        p = tl.exp2(tl.where(met, scores, -_INF) - lse[:, None])
        dp = tl.dot(dout, v.trans(), input_precision=PRECISION)
        if DROPS:
            dp *= factors(drops, drawn_of_columns(drops, column, bias, WIDE))
        dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision=PRECISION)
    dq *= grad_scale
    o_base = dq_ptr + batch * stride_ob + head.to(tl.int64) * stride_oh + place * stride_os
    if ADDS:
        if last > first:
            dq += load_rows(o_base, row, stride_os, valid, HEAD_DIM, BLOCK_D).to(tl.float32)
            store_rows(o_base, row, stride_os, valid, dq, HEAD_DIM, BLOCK_D)
    else:
        store_rows(o_base, row, stride_os, valid, dq, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=AS_THEY_ARE)
def block_gradients_of_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, stats_ptr, dk_ptr, dv_ptr, head_table, starts, cols, biases, mask_ids, masks,
    ends, documents, draws,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    q_len, k_len, scale, grad_scale, num_heads, group_heads, block_rows, batch_tables, leading,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr,
    DROPS: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys, from the queries of one query head: grid (tiles * query heads, batch)."""
    length = q_len
    inside, row, head, batch, place, q_len, k_len, first, masked, last = rows_of_program(
        documents, head_table, starts, ends, num_heads, block_rows, batch_tables, leading, q_len, k_len,
        BLOCK, BLOCK_M, PACKED, PACKED,
    )  # fmt: skip
    valid = row < k_len
    q_base = q_ptr + batch * stride_qb + head.to(tl.int64) * stride_qh + place * stride_qs
    g_base = dout_ptr + batch * stride_gb + head.to(tl.int64) * stride_gh + place * stride_gs
    k_base = k_ptr + batch * stride_kb + (head // group_heads).to(tl.int64) * stride_kh + place * stride_ks
    v_base = v_ptr + batch * stride_vb + (head // group_heads).to(tl.int64) * stride_vh + place * stride_vs
    k = load_rows(k_base, row, stride_ks, valid, HEAD_DIM, BLOCK_D)
    v = load_rows(v_base, row, stride_vs, valid, HEAD_DIM, BLOCK_D)
    stats_base = stats_ptr + (batch * num_heads + head) * length + place
    drops = 0
    if DROPS:
        drops = drawn_of_rows(draws, place + row, valid, place, batch * num_heads + head, True)
    dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    offset = tl.arange(0, BLOCK_N)
    parts: tl.constexpr = BLOCK // BLOCK_N
    for step in range((masked - first) * parts):
        entry = first + step // parts
        column = tl.load(cols + entry) * BLOCK + (step % parts) * BLOCK_N + offset
        dk, dv = key_gradient_tile(
            k, v, dk, dv, q_base, g_base, stats_base, stride_qs, stride_gs, column, offset, offset, False,
            scale, tl.load(biases + entry), drops, HEAD_DIM, BLOCK_D, PRECISION, WIDE, DROPS,
        )  # fmt: skip
    for step in range((last - masked) * parts):
        entry = masked + step // parts
        within = (step % parts) * BLOCK_N + offset
        seen = tl.load(cols + entry) * BLOCK + within
        column = tl.minimum(seen, q_len - 1)
        q = load_columns(q_base, column, stride_qs, HEAD_DIM, BLOCK_D, WIDE)
        dout = load_columns(g_base, column, stride_gs, HEAD_DIM, BLOCK_D, WIDE)
        lse, delta = unpack(tl.load(stats_base + column))
        bias = tl.load(biases + entry)
        scores = tl.dot(k, q.trans(), input_precision=PRECISION) * scale + (0.0 if DROPS else bias)
        met = met_of_entry(masks, tl.load(mask_ids + entry), inside, within, seen, q_len, True, BLOCK, PACKED)
        p = tl.exp2(tl.where(met, scores, -_INF) - lse[None, :])
        kept = p
        if DROPS:
            factor = factors(drops, drawn_of_columns(drops, column, bias, WIDE))
            kept *= factor
        dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, dout.trans(), input_precision=PRECISION)
        if DROPS:
            dp *= factor
        dk = tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk, input_precision=PRECISION)
    place_out = batch * stride_ob + head.to(tl.int64) * stride_oh + place * stride_os
    store_rows(dk_ptr + place_out, row, stride_os, valid, dk * grad_scale, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + place_out, row, stride_os, valid, dv, HEAD_DIM, BLOCK_D)
