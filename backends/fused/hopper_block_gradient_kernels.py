"""The backward pass over tables of blocks for Hopper, in Gluon: as `block_gradient_kernels`, with a ring that feeds.

Rows, blocks and letters as in `hopper_block_kernels`.
"""

from __future__ import annotations

from importlib.metadata import version

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait

from .addressing import AS_THEY_ARE
from .gradient_kernels import unpack
from .hopper_block_kernels import PARTS, bias_and_scores, feed_blocks, place_of_program
from .hopper_ring import (
    NOTHING,
    PAIRS,
    ROWS,
    as_rows,
    free_step,
    in_shared,
    load_rows,
    make_ring,
    pieces,
    product,
    store_rows,
    tiles_of_step,
    wait_for_step,
)
from .hopper_steps import (
    add_to_dk,
    add_to_dk_dv,
    add_to_dq,
    add_to_dv,
    as_operand,
    begin_adding,
    begin_product,
    begin_products,
    both_have_come,
    first_of_products,
    plus,
    scores_of,
    times,
    weights_of,
    zeros,
)

# A tenth faster, where the compiler has registers for it: with Triton 3.9 it took more than twice as long.
_K_FROM_REGISTERS = gl.constexpr(version("triton").startswith("3.6."))


@gluon.jit
def _queries_part(
    given, PART: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, BLOCK: gl.constexpr, ADDS: gl.constexpr, IN_ORDER: gl.constexpr,
):  # fmt: skip
    """dq of the rows of a part."""
    (ring, blocks, first, inside, q_base, stride_q, g_base, stride_g, stats_base, dq_base, stride_o, length, keys,
     scale, grad_scale) = given  # fmt: skip
    row = first + PART * ROWS + gl.arange(0, ROWS, as_rows(BLOCK_D))
    of_scores = PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, product(BLOCK_N)))
    x = load_rows(q_base, row, stride_q, row < length, HEAD_DIM, BLOCK_D, WIDE)
    y = load_rows(g_base, row, stride_g, row < length, HEAD_DIM, BLOCK_D, WIDE)
    q, dout = in_shared(x), in_shared(y)
    fence_async_shared()
    lse, delta = unpack(gl.load(stats_base + first + of_scores, mask=first + of_scores < length, other=0))
    dq = zeros(ROWS, BLOCK_D)
    for number in range(blocks[5]):
        k, v, _besides = wait_for_step(ring, number, STAGES)
        scores, dp = first_of_products(q, k, dout, v, BLOCK_N)
        bias, scores = bias_and_scores(
            scores, blocks, number, inside + of_scores, keys, False, IN_ORDER, BLOCK, BLOCK_N
        )  # fmt: skip
        dq = add_to_dq(scores, dp, k, dq, lse, delta, scale, bias, 0, 0, False, False, BLOCK_D)
        free_step(ring, number, STAGES)
    dq = times(dq, grad_scale)
    if ADDS:
        dq = plus(dq, load_rows(dq_base, row, stride_o, row < length, HEAD_DIM, BLOCK_D, WIDE))
    store_rows(dq_base, row, stride_o, row < length, dq, HEAD_DIM, BLOCK_D, WIDE)


@gluon.jit(do_not_specialize=AS_THEY_ARE)
def block_gradients_of_queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, stats_ptr, dq_ptr, head_table, starts, cols, biases, mask_ids, masks,
    ends, documents, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    q_len, k_len, scale, grad_scale, num_heads, group_heads, block_rows, batch_tables, leading,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    BLOCK: gl.constexpr, ADDS: gl.constexpr, PACKED: gl.constexpr, IN_ORDER: gl.constexpr,
    PART_REGISTERS: gl.constexpr, FEED_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `block_gradient_kernels.block_gradients_of_queries`, of tiles of 128 rows."""
    head, batch, place, queries, keys, first, inside, blocks = place_of_program(
        num_heads, head_table, starts, cols, biases, mask_ids, masks, ends, documents, q_len, k_len, block_rows,
        batch_tables, leading, BLOCK, BLOCK_N, PACKED, IN_ORDER, PARTS,
    )  # fmt: skip
    ring = make_ring(q_ptr.dtype.element_ty, NOTHING, BLOCK_N, BLOCK_D, STAGES, PARTS)
    key_head = head // group_heads
    k_base = k_ptr + batch * stride_kb + key_head * stride_kh + place * stride_ks
    v_base = v_ptr + batch * stride_vb + key_head * stride_vh + place * stride_vs
    part = (
        ring, blocks, first, inside, q_ptr + batch * stride_qb + head * stride_qh + place * stride_qs, stride_qs,
        dout_ptr + batch * stride_gb + head * stride_gh + place * stride_gs, stride_gs,
        stats_ptr + (batch * num_heads + head) * q_len + place,
        dq_ptr + batch * stride_ob + head * stride_oh + place * stride_os, stride_os, queries, keys, scale,
        grad_scale,
    )  # fmt: skip
    feed = (ring, blocks, (k_base, stride_ks, v_base, stride_vs, stats_ptr), keys)
    gl.warp_specialize(
        [
            (_queries_part, (part, 0, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, BLOCK, ADDS, IN_ORDER)),
            (_queries_part, (part, 1, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, BLOCK, ADDS, IN_ORDER)),
            (feed_blocks, (feed, NOTHING, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, BLOCK)),
        ],
        [4, 4],
        [PART_REGISTERS, FEED_REGISTERS],
    )


@gluon.jit
def _keys_steps(
    x, y, ring, blocks, inside, queries, scale, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    BLOCK: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """dk and dv of rows x of k and y of v: the sums over all steps."""
    k, v = in_shared(x), in_shared(y)
    fence_async_shared()
    dk, dv = zeros(ROWS, BLOCK_D), zeros(ROWS, BLOCK_D)
    for number in range(blocks[5]):
        q, dout, stats = wait_for_step(ring, number, STAGES)
        scores, dp = begin_products(k, q, v, dout, BLOCK_N)
        lse, delta = unpack(stats.load(gl.SliceLayout(0, product(BLOCK_N))))
        scores = warpgroup_mma_wait(pieces(BLOCK_D), deps=[scores])
        bias, scores = bias_and_scores(scores, blocks, number, inside, queries, True, PACKED, BLOCK, BLOCK_N)
        dk, dv = add_to_dk_dv(scores, dp, q, dout, dk, dv, lse, delta, scale, bias, 0, 0, False, False, BLOCK_D)
        dk, dv = both_have_come(dk, dv)
        free_step(ring, number, STAGES)
    return dk, dv


@gluon.jit
def _keys_steps_behind(
    x, y, ring, blocks, inside, queries, scale, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    BLOCK: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """As `_keys_steps`; p and ds of a step are multiplied with the next one's scores and dp, under its exponentials.

    Steps are of as few columns as its registers hold, and waits between their products would be longer than these.
    """
    operand: gl.constexpr = weights_of(BLOCK_D)
    k = as_operand(x, BLOCK_N) if _K_FROM_REGISTERS else in_shared(x)
    v = in_shared(y)
    fence_async_shared()
    p = gl.zeros([ROWS, BLOCK_N], x[0].dtype, operand)
    ds = p
    dk, dv = zeros(ROWS, BLOCK_D), zeros(ROWS, BLOCK_D)
    for number in range(blocks[5]):
        q, dout, stats = wait_for_step(ring, number, STAGES)
        q_before, dout_before, _stats = tiles_of_step(ring, gl.maximum(number - 1, 0), STAGES)
        scores = begin_product(k, q, BLOCK_N)
        # Before the first step there is none: what is multiplied then is not added to.
        dv = begin_adding(p, dout_before, dv, number > 1)
        dk = begin_adding(ds, q_before, dk, number > 1)
        dp = begin_product(v, dout, BLOCK_N)
        lse, delta = unpack(stats.load(gl.SliceLayout(0, product(BLOCK_N))))
        scores = warpgroup_mma_wait(3 * pieces(BLOCK_D), deps=[scores])
        bias, scores = bias_and_scores(scores, blocks, number, inside, queries, True, PACKED, BLOCK, BLOCK_N)
        weights = gl.exp2(scores * scale + (bias - lse)[None, :])
        sums, come = both_have_come(dk + dv, (dp,))
        dk, dv, dp = sums[: len(dk)], sums[len(dk) :], come[0]
        if number > 0:
            free_step(ring, number - 1, STAGES)
        ds = gl.convert_layout((weights * (dp - delta[None, :])).to(x[0].dtype), operand)
        p = gl.convert_layout(weights.to(x[0].dtype), operand)
    last = blocks[5] - 1
    if last >= 0:
        q, dout, _stats = tiles_of_step(ring, last, STAGES)
        dv = begin_adding(p, dout, dv, last > 0)
        dk = begin_adding(ds, q, dk, last > 0)
        dk, dv = both_have_come(dk, dv)
        free_step(ring, last, STAGES)
    return dk, dv


@gluon.jit
def _keys_part(
    given, PART: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, BLOCK: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """dk and dv of the rows of a part."""
    (ring, blocks, first, inside, k_base, stride_k, v_base, stride_v, dk_base, dv_base, stride_o, length, queries,
     scale, grad_scale) = given  # fmt: skip
    row = first + PART * ROWS + gl.arange(0, ROWS, as_rows(BLOCK_D))
    inside += PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, product(BLOCK_N)))
    x = load_rows(k_base, row, stride_k, row < length, HEAD_DIM, BLOCK_D, WIDE)
    y = load_rows(v_base, row, stride_v, row < length, HEAD_DIM, BLOCK_D, WIDE)
    if BLOCK_D > 64:
        dk, dv = _keys_steps_behind(
            x, y, ring, blocks, inside, queries, scale, BLOCK_D, BLOCK_N, STAGES, BLOCK, PACKED
        )  # fmt: skip
    else:
        dk, dv = _keys_steps(x, y, ring, blocks, inside, queries, scale, BLOCK_D, BLOCK_N, STAGES, BLOCK, PACKED)
    store_rows(dk_base, row, stride_o, row < length, times(dk, grad_scale), HEAD_DIM, BLOCK_D, WIDE)
    store_rows(dv_base, row, stride_o, row < length, dv, HEAD_DIM, BLOCK_D, WIDE)


@gluon.jit
def _apart(
    given, PART: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, BLOCK: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """As over branches: dv of the rows of a program, or dk."""
    OF_VALUES: gl.constexpr = PART == 0
    (ring, blocks, first, inside, k_base, stride_k, v_base, stride_v, dk_base, dv_base, stride_o, length, queries,
     scale, grad_scale) = given  # fmt: skip
    row = first + gl.arange(0, ROWS, as_rows(BLOCK_D))
    inside += gl.arange(0, ROWS, gl.SliceLayout(1, product(BLOCK_N)))
    k = in_shared(load_rows(k_base, row, stride_k, row < length, HEAD_DIM, BLOCK_D, WIDE))
    if not OF_VALUES:
        v = in_shared(load_rows(v_base, row, stride_v, row < length, HEAD_DIM, BLOCK_D, WIDE))
    fence_async_shared()
    sums = zeros(ROWS, BLOCK_D)
    for number in range(blocks[5]):
        q, dout, stats = wait_for_step(ring, number, STAGES)
        lse, delta = unpack(stats.load(gl.SliceLayout(0, product(BLOCK_N))))
        if OF_VALUES:
            scores = scores_of(k, q, BLOCK_N)
        else:
            scores, dp = first_of_products(k, q, v, dout, BLOCK_N)
        bias, scores = bias_and_scores(scores, blocks, number, inside, queries, True, PACKED, BLOCK, BLOCK_N)
        if OF_VALUES:
            sums = add_to_dv(scores, dout, sums, lse, scale, bias, 0, 0, False, False, BLOCK_D)
        else:
            sums = add_to_dk(scores, dp, q, sums, lse, delta, scale, bias, 0, 0, False, False, BLOCK_D)
        free_step(ring, number, STAGES)
    if OF_VALUES:
        store_rows(dv_base, row, stride_o, row < length, sums, HEAD_DIM, BLOCK_D, WIDE)
    else:
        store_rows(dk_base, row, stride_o, row < length, times(sums, grad_scale), HEAD_DIM, BLOCK_D, WIDE)


@gluon.jit(do_not_specialize=AS_THEY_ARE)
def block_gradients_of_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, stats_ptr, dk_ptr, dv_ptr, head_table, starts, cols, biases, mask_ids, masks,
    ends, documents, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    q_len, k_len, scale, grad_scale, num_heads, group_heads, block_rows, batch_tables, leading,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    BLOCK: gl.constexpr, APART: gl.constexpr, PACKED: gl.constexpr,
    PART_REGISTERS: gl.constexpr, FEED_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `block_gradient_kernels.block_gradients_of_keys`, of tiles of 128 rows, or of 64 if APART (`_apart`)."""
    head, batch, place, queries, keys, first, inside, blocks = place_of_program(
        num_heads, head_table, starts, cols, biases, mask_ids, masks, ends, documents, q_len, k_len, block_rows,
        batch_tables, leading, BLOCK, BLOCK_N, PACKED, PACKED, 1 if APART else PARTS,
    )  # fmt: skip
    ring = make_ring(q_ptr.dtype.element_ty, PAIRS, BLOCK_N, BLOCK_D, STAGES, PARTS)
    key_head = head // group_heads
    k_base = k_ptr + batch * stride_kb + key_head * stride_kh + place * stride_ks
    v_base = v_ptr + batch * stride_vb + key_head * stride_vh + place * stride_vs
    q_base = q_ptr + batch * stride_qb + head * stride_qh + place * stride_qs
    g_base = dout_ptr + batch * stride_gb + head * stride_gh + place * stride_gs
    stats_base = stats_ptr + (batch * num_heads + head) * q_len + place
    place = batch * stride_ob + head * stride_oh + place * stride_os
    part = (
        ring, blocks, first, inside, k_base, stride_ks, v_base, stride_vs, dk_ptr + place, dv_ptr + place, stride_os,
        keys, queries, scale, grad_scale,
    )  # fmt: skip
    feed = (ring, blocks, (q_base, stride_qs, g_base, stride_gs, stats_base), queries)
    gl.warp_specialize(
        [
            (_apart if APART else _keys_part, (part, 0, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, BLOCK, PACKED)),
            (_apart if APART else _keys_part, (part, 1, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, BLOCK, PACKED)),
            (feed_blocks, (feed, PAIRS, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, BLOCK)),
        ],
        [4, 4],
        [PART_REGISTERS, FEED_REGISTERS],
    )
