"""The backward pass over branches for Hopper, in Gluon: as that of `gradient_kernels`, with a ring that feeds.

Letters as in `addressing`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .addressing import AS_THEY_ARE
from .gradient_kernels import unpack
from .hopper_kernels import after_step, feed_runs, next_step, place_of_program, rows_of_part
from .hopper_ring import (
    NOTHING,
    PAIRS,
    ROWS,
    as_rows,
    free_step,
    in_shared,
    load_rows,
    make_ring,
    pass_over,
    pieces,
    product,
    store_rows,
    wait_for_step,
)
from .hopper_steps import (
    add_to_dk,
    add_to_dk_dv,
    add_to_dq,
    add_to_dv,
    begin_products,
    both_have_come,
    first_of_products,
    scores_of,
    times,
    zeros,
)


@gluon.jit
def _queries_part(
    given, PART: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, SPLIT: gl.constexpr, SHIFTS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """dq of the rows of a part."""
    ring, walked, rows, q_base, stride_q, g_base, stride_g, stats_base, dq_base, stride_o, scale, grad_scale = given
    low, totals = rows[5], walked[3]
    row, exists = rows_of_part(rows, PART, as_rows(BLOCK_D))
    position, valid = rows_of_part(rows, PART, gl.SliceLayout(1, product(BLOCK_N)))
    x = load_rows(q_base, row - low, stride_q, exists, HEAD_DIM, BLOCK_D, WIDE)
    y = load_rows(g_base, row - low, stride_g, exists, HEAD_DIM, BLOCK_D, WIDE)
    q, dout = in_shared(x), in_shared(y)
    fence_async_shared()
    lse, delta = unpack(gl.load(stats_base + position - low, mask=valid, other=0))
    dq = zeros(ROWS, BLOCK_D)
    bound = gl.zeros([ROWS], gl.int32, gl.SliceLayout(1, product(BLOCK_N)))
    number, left, mine, full, bias = 0, 0, 0, 0, 0.0
    for _ in range(gl.load(totals + 1 + PART)):
        walked, number, left, mine, full, bound, bias = next_step(
            ring, walked, position, valid, number, left, mine, full, bound, bias, PART, PARTS, BLOCK_N, STAGES, SHIFTS
        )  # fmt: skip
        k, v, _besides = wait_for_step(ring, number, STAGES)
        scores, dp = first_of_products(q, k, dout, v, BLOCK_N)
        dq = add_to_dq(scores, dp, k, dq, lse, delta, scale, bias, full, bound, True, SPLIT, BLOCK_D)
        free_step(ring, number, STAGES)
        number, left, mine, full, bound = after_step(number, left, mine, full, bound, BLOCK_N)
    for other in range(number, gl.load(totals)):
        pass_over(ring, other, STAGES)
    store_rows(dq_base, row - low, stride_o, exists, times(dq, grad_scale), HEAD_DIM, BLOCK_D, WIDE)


@gluon.jit(do_not_specialize=AS_THEY_ARE)
def gradients_of_queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, stats_ptr, dq_ptr,
    head_kind, slot_group, slot_index, group_size, group_start, residues, walks, biases, run_start, runs, totals,
    documents, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    q_low, q_high, k_low, k_high, origin, scale, grad_scale, num_heads, group_heads,
    period, groups, most_walks, blocks, block_runs,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    SPLIT: gl.constexpr, SHIFTS: gl.constexpr, PARTS: gl.constexpr, PACKED: gl.constexpr,
    PART_REGISTERS: gl.constexpr, FEED_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `gradient_kernels.gradients_of_queries`, of tiles of 128 rows."""
    head, batch, first_row, first_column, rows, walked = place_of_program(
        num_heads, head_kind, slot_group, slot_index, group_size, group_start, residues, walks, biases, run_start,
        runs, totals, documents, q_low, q_high, k_low, k_high, origin, period, groups, most_walks, blocks,
        block_runs, PARTS, PACKED,
    )  # fmt: skip
    ring = make_ring(q_ptr.dtype.element_ty, NOTHING, BLOCK_N, BLOCK_D, STAGES, PARTS)
    key_head = head // group_heads
    k_base = k_ptr + batch * stride_kb + key_head * stride_kh + first_column * stride_ks
    v_base = v_ptr + batch * stride_vb + key_head * stride_vh + first_column * stride_vs
    part = (
        ring, walked, rows, q_ptr + batch * stride_qb + head * stride_qh + first_row * stride_qs, stride_qs,
        dout_ptr + batch * stride_gb + head * stride_gh + first_row * stride_gs, stride_gs,
        stats_ptr + (batch * num_heads + head) * (q_high - q_low) + first_row,
        dq_ptr + batch * stride_ob + head * stride_oh + first_row * stride_os, stride_os, scale, grad_scale,
    )  # fmt: skip
    feed = (ring, walked, (k_base, stride_ks, v_base, stride_vs, stats_ptr))
    gl.warp_specialize(
        [
            (_queries_part, (part, 0, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, SPLIT, SHIFTS, PARTS)),
            (_queries_part, (part, 1, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, SPLIT, SHIFTS, PARTS)),
            (feed_runs, (feed, NOTHING, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, SHIFTS, PARTS)),
        ],
        [4, 4],
        [PART_REGISTERS, FEED_REGISTERS],
    )


@gluon.jit
def _keys_steps(
    k, v, ring, walked, own, position, valid, dk, dv, scale,
    PART: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
    SHIFTS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The sums over the steps of a part that has some, and how many it has come to."""
    bound = gl.zeros([ROWS], gl.int32, gl.SliceLayout(1, product(BLOCK_N)))
    number, left, mine, full, bias = 0, 0, 0, 0, 0.0
    if PARTS == 1:
        dk, dv = [warpgroup_mma_init(x) for x in dk], [warpgroup_mma_init(x) for x in dv]
    for _ in range(own):
        walked, number, left, mine, full, bound, bias = next_step(
            ring, walked, position, valid, number, left, mine, full, bound, bias, PART, PARTS, BLOCK_N, STAGES, SHIFTS
        )  # fmt: skip
        q, dout, stats = wait_for_step(ring, number, STAGES)
        scores, dp = begin_products(k, q, v, dout, BLOCK_N)
        lse, delta = unpack(stats.load(gl.SliceLayout(0, product(BLOCK_N))))
        scores = warpgroup_mma_wait(pieces(BLOCK_D), deps=[scores])  # and those of the step before
        if number > 0 if PARTS == 1 else False:
            free_step(ring, number - 1, STAGES)
        dk, dv = add_to_dk_dv(
            scores, dp, q, dout, dk, dv, lse, delta, scale, bias, full, bound, True, SPLIT, BLOCK_D
        )  # fmt: skip
        if PARTS == 2:
            dk, dv = both_have_come(dk, dv)
            free_step(ring, number, STAGES)
        number, left, mine, full, bound = after_step(number, left, mine, full, bound, BLOCK_N)
    if PARTS == 1:
        dk, dv = both_have_come(dk, dv)
    return dk, dv, number


@gluon.jit
def _keys_part(
    given, PART: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, SPLIT: gl.constexpr, SHIFTS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """dk and dv of the rows of a part."""
    ring, walked, rows, k_base, stride_k, v_base, stride_v, dk_base, dv_base, stride_o, scale, grad_scale = given
    low, totals = rows[5], walked[3]
    row, exists = rows_of_part(rows, PART, as_rows(BLOCK_D))
    position, valid = rows_of_part(rows, PART, gl.SliceLayout(1, product(BLOCK_N)))
    x = load_rows(k_base, row - low, stride_k, exists, HEAD_DIM, BLOCK_D, WIDE)
    y = load_rows(v_base, row - low, stride_v, exists, HEAD_DIM, BLOCK_D, WIDE)
    k, v = in_shared(x), in_shared(y)
    fence_async_shared()
    dk, dv = zeros(ROWS, BLOCK_D), zeros(ROWS, BLOCK_D)
    own, number = gl.load(totals + 1 + PART), 0
    if own > 0:
        dk, dv, number = _keys_steps(
            k, v, ring, walked, own, position, valid, dk, dv, scale,
            PART, BLOCK_D, BLOCK_N, STAGES, SPLIT, SHIFTS, PARTS,
        )  # fmt: skip
    if PARTS == 2:
        for other in range(number, gl.load(totals)):
            pass_over(ring, other, STAGES)
    store_rows(dk_base, row - low, stride_o, exists, times(dk, grad_scale), HEAD_DIM, BLOCK_D, WIDE)
    store_rows(dv_base, row - low, stride_o, exists, dv, HEAD_DIM, BLOCK_D, WIDE)


@gluon.jit
def _apart(
    given, PART: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, SPLIT: gl.constexpr, SHIFTS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """dv of the rows of a program, or dk: beyond head_dim 128 a part has registers for one of them."""
    OF_VALUES: gl.constexpr = PART == 0
    ring, walked, rows, k_base, stride_k, v_base, stride_v, dk_base, dv_base, stride_o, scale, grad_scale = given
    low, totals = rows[5], walked[3]
    row, exists = rows_of_part(rows, 0, as_rows(BLOCK_D))
    position, valid = rows_of_part(rows, 0, gl.SliceLayout(1, product(BLOCK_N)))
    k = in_shared(load_rows(k_base, row - low, stride_k, exists, HEAD_DIM, BLOCK_D, WIDE))
    if not OF_VALUES:
        v = in_shared(load_rows(v_base, row - low, stride_v, exists, HEAD_DIM, BLOCK_D, WIDE))
    fence_async_shared()
    sums = zeros(ROWS, BLOCK_D)
    bound = gl.zeros([ROWS], gl.int32, gl.SliceLayout(1, product(BLOCK_N)))
    number, left, mine, full, bias = 0, 0, 0, 0, 0.0
    for _ in range(gl.load(totals)):
        walked, number, left, mine, full, bound, bias = next_step(
            ring, walked, position, valid, number, left, mine, full, bound, bias, 0, PARTS, BLOCK_N, STAGES, SHIFTS
        )  # fmt: skip
        q, dout, stats = wait_for_step(ring, number, STAGES)
        lse, delta = unpack(stats.load(gl.SliceLayout(0, product(BLOCK_N))))
        if OF_VALUES:
            scores = scores_of(k, q, BLOCK_N)
            sums = add_to_dv(scores, dout, sums, lse, scale, bias, full, bound, True, SPLIT, BLOCK_D)
        else:
            scores, dp = first_of_products(k, q, v, dout, BLOCK_N)
            sums = add_to_dk(scores, dp, q, sums, lse, delta, scale, bias, full, bound, True, SPLIT, BLOCK_D)
        free_step(ring, number, STAGES)
        number, left, mine, full, bound = after_step(number, left, mine, full, bound, BLOCK_N)
    if OF_VALUES:
        store_rows(dv_base, row - low, stride_o, exists, sums, HEAD_DIM, BLOCK_D, WIDE)
    else:
        store_rows(dk_base, row - low, stride_o, exists, times(sums, grad_scale), HEAD_DIM, BLOCK_D, WIDE)


@gluon.jit(do_not_specialize=AS_THEY_ARE)
def gradients_of_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, stats_ptr, dk_ptr, dv_ptr,
    head_kind, slot_group, slot_index, group_size, group_start, residues, walks, biases, run_start, runs, totals,
    documents, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    q_low, q_high, k_low, k_high, origin, scale, grad_scale, num_heads, group_heads,
    period, groups, most_walks, blocks, block_runs,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    SPLIT: gl.constexpr, SHIFTS: gl.constexpr, PARTS: gl.constexpr, APART: gl.constexpr, PACKED: gl.constexpr,
    PART_REGISTERS: gl.constexpr, FEED_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `gradient_kernels.gradients_of_keys`, of tiles of 64 rows a part; APART dk and dv of 64 rows have one each."""
    head, batch, first_row, first_column, rows, walked = place_of_program(
        num_heads, head_kind, slot_group, slot_index, group_size, group_start, residues, walks, biases, run_start,
        runs, totals, documents, k_low, k_high, q_low, q_high, origin, period, groups, most_walks, blocks,
        block_runs, PARTS, PACKED,
    )  # fmt: skip
    ring = make_ring(q_ptr.dtype.element_ty, PAIRS, BLOCK_N, BLOCK_D, STAGES, 2 if APART else PARTS)
    key_head = head // group_heads
    k_base = k_ptr + batch * stride_kb + key_head * stride_kh + first_row * stride_ks
    v_base = v_ptr + batch * stride_vb + key_head * stride_vh + first_row * stride_vs
    q_base = q_ptr + batch * stride_qb + head * stride_qh + first_column * stride_qs
    g_base = dout_ptr + batch * stride_gb + head * stride_gh + first_column * stride_gs
    stats_base = stats_ptr + (batch * num_heads + head) * (q_high - q_low) + first_column
    place = batch * stride_ob + head * stride_oh + first_row * stride_os
    part = (
        ring, walked, rows, k_base, stride_ks, v_base, stride_vs, dk_ptr + place, dv_ptr + place, stride_os,
        scale, grad_scale,
    )  # fmt: skip
    feed = (ring, walked, (q_base, stride_qs, g_base, stride_gs, stats_base))
    if PARTS == 1 and not APART:
        gl.warp_specialize(
            [
                (_keys_part, (part, 0, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, SPLIT, SHIFTS, PARTS)),
                (feed_runs, (feed, PAIRS, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, SHIFTS, PARTS)),
            ],
            [4],
            [FEED_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _apart if APART else _keys_part,
                    (part, 0, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, SPLIT, SHIFTS, PARTS),
                ),
                (
                    _apart if APART else _keys_part,
                    (part, 1, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, SPLIT, SHIFTS, PARTS),
                ),
                (feed_runs, (feed, PAIRS, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, SHIFTS, PARTS)),
            ],
            [4, 4],
            [PART_REGISTERS, FEED_REGISTERS],
        )
