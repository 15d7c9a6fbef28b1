"""All gradients in one launch, for Hopper, in Gluon, with dq summed in memory: over branches, and what blocks share.

Scores and their exponentials are then computed once in place of twice: five products in place of seven. Two parts of 64
keys have dk and dv to themselves, as in `hopper_gradient_kernels`. What they find of ds they hand on through shared
memory to four more warps, which multiply it by the keys of both and add that to dq: in float32 and in any order, so
that its last bits differ from run to run. Shared memory is what bounds them: so k and v are operands from registers, up
to head_dim 64, and lse and delta are taken off by the products themselves, whose columns have "levels"
(`gradient_kernels`).

Letters as in `addressing`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .addressing import AS_THEY_ARE, next_run
from .gradient_kernels import LEVEL_COLUMNS
from .hopper_kernels import after_step, feed_runs, next_step, place_of_program, rows_of_part
from .hopper_ring import (
    LEVEL_TILES,
    LEVELS,
    LEVELS_IN_MEMORY,
    ROWS,
    as_rows,
    free_step,
    in_shared,
    load_rows,
    make_barriers,
    make_ring,
    of_slot,
    pass_over,
    pieces,
    product,
    room_for_rows,
    start_of,
    store_rows,
    tiles_of,
    wait_for_step,
    width_of,
)
from .hopper_steps import (
    add_columns,
    as_operand,
    begin_adding,
    begin_product,
    both_have_come,
    times,
    weights_of,
    where_met,
    zeros,
)

PARTS = gl.constexpr(2)
_HANDED = gl.constexpr(2)  # steps that a part may be ahead of the warps that add


@gluon.constexpr_function
def _sums_in_memory(width):
    """Layout of rows of float32 as they are added, 16 bytes a thread."""
    return gl.BlockedLayout([1, 4], [128 // width, width // 4], [4, 1], [1, 0])


@gluon.jit
def make_hand(dtype: gl.constexpr, BLOCK_N: gl.constexpr):
    """Tiles of ds of a part, and barriers: which are ready, and which are free."""
    tiles = gl.allocate_shared_memory(dtype, [_HANDED, ROWS, BLOCK_N], tiles_of(BLOCK_N))
    ready, free = make_barriers(_HANDED, 1, 1)
    return tiles, ready, free


@gluon.jit
def _hand_on(hand, number, ds):
    """Of a part: ds (64, N) of its step `number`, counted without those that it passes over."""
    tiles, ready, free = hand
    slot = number % _HANDED
    mbarrier.wait(free.index(slot), (number // _HANDED) & 1 ^ 1)
    tiles.index(slot).store(ds)
    fence_async_shared()
    mbarrier.arrive(ready.index(slot))


@gluon.jit
def own_rows(
    keys, rows, exists, k_base, stride_k, v_base, stride_v, PART: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """k and v of a part as operands, k also where the warps that add find it."""
    x = load_rows(k_base, rows, stride_k, exists, HEAD_DIM, BLOCK_D, WIDE)
    y = load_rows(v_base, rows, stride_v, exists, HEAD_DIM, BLOCK_D, WIDE)
    for piece in gl.static_range(pieces(BLOCK_D)):
        keys[piece].index(PART).store(x[piece])
    fence_async_shared()
    if BLOCK_D > 64:  # no registers for them beside so much of dk and dv
        k, v = of_slot(keys, PART), in_shared(y)
        fence_async_shared()
    else:
        k, v = as_operand(x, BLOCK_N), as_operand(y, BLOCK_N)
    return k, v


@gluon.jit
def make_ones():
    """Rows (64, 16) that sum the levels of scores, and those of dp."""
    column = gl.arange(0, LEVEL_COLUMNS, gl.SliceLayout(0, LEVELS_IN_MEMORY))[None, :]
    column += gl.zeros([ROWS, 1], gl.int32, LEVELS_IN_MEMORY)
    ones = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, LEVEL_COLUMNS], LEVEL_TILES)
    ones.index(0).store(gl.where(column < 3, 1.0, 0.0).to(gl.bfloat16))
    ones.index(1).store(gl.where((column >= 3) & (column < 6), 1.0, 0.0).to(gl.bfloat16))
    fence_async_shared()
    return ones


@gluon.jit
def begin_step(k, q, v, dout, levels, ones, BLOCK_N: gl.constexpr):
    """k·q - lse / scale and v·dout - delta (64, N): the first has come, the second is under way."""
    scores = warpgroup_mma(ones.index(0), levels.permute((1, 0)), begin_product(k, q, BLOCK_N), is_async=True)
    dp = warpgroup_mma(ones.index(1), levels.permute((1, 0)), begin_product(v, dout, BLOCK_N), is_async=True)
    return warpgroup_mma_wait(len(k) + 1, deps=[scores]), dp


@gluon.jit
def finish_step(
    ring, hand, number, done, p, dp, q, dout, dk, dv, BLOCK_D: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """dk and dv with a step of which p is there and dp is under way; `done` counts steps of the part."""
    operand: gl.constexpr = weights_of(BLOCK_D)
    dv = begin_adding(gl.convert_layout(p.to(q[0].dtype), operand), dout, dv)
    dp = warpgroup_mma_wait(len(dv), deps=[dp])
    ds = (p * dp).to(q[0].dtype)
    _hand_on(hand, done, ds)
    dk = begin_adding(gl.convert_layout(ds, operand), q, dk)
    dk, dv = both_have_come(dk, dv)
    free_step(ring, number, STAGES)
    return dk, dv


@gluon.jit
def add_product(dq, hand, number, k):
    """dq (N, D) and dsᵀ·k of a part and its step `number`."""
    tiles, ready, free = hand
    slot = number % _HANDED
    mbarrier.wait(ready.index(slot), (number // _HANDED) & 1)
    dq = add_columns(tiles.index(slot).permute((1, 0)), k, dq)
    mbarrier.arrive(free.index(slot))
    return dq


@gluon.jit
def _add_fours(place, x, met):
    """Add x, four neighbours of a thread at a time, to what is at `place` of the first of them, where they are met."""
    gl.inline_asm_elementwise(
        """
        {
            .reg .pred met;
            setp.ne.s32 met, $12, 0;
            @met red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11};
        }
        """,
        "=r,=r,=r,=r,l,l,l,l,f,f,f,f,r,r,r,r",
        [place.to(gl.int64), x, met.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=4,
    )


@gluon.jit
def _add_piece(
    base, rows, stride, exists, dq, PIECE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr,
    WIDE: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = _sums_in_memory(dq.shape[1])
    column = gl.arange(0, dq.shape[1], gl.SliceLayout(0, layout)) + start_of(BLOCK_D, PIECE)
    rows = gl.convert_layout(rows, gl.SliceLayout(1, layout))
    exists = gl.convert_layout(exists, gl.SliceLayout(1, layout))
    if WIDE:
        rows = rows.to(gl.int64)
    place = base + (rows[:, None] * stride + (column // 4 * 4)[None, :])
    _add_fours(place, gl.convert_layout(dq, layout), exists[:, None] & (column < HEAD_DIM)[None, :])


@gluon.jit
def _add_rows(base, rows, stride, exists, dq, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, WIDE: gl.constexpr):
    """Add dq (N, D) to the sums of rows that exist."""
    for piece in gl.static_range(pieces(BLOCK_D)):
        _add_piece(base, rows, stride, exists, dq[piece], piece, HEAD_DIM, BLOCK_D, WIDE)


@gluon.jit
def _part(
    given, PART: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, SPLIT: gl.constexpr, SHIFTS: gl.constexpr,
):  # fmt: skip
    """dk and dv of the rows of a part."""
    ring, hand, ones, both = given
    keys, walked, rows, k_base, stride_k, v_base, stride_v, dk_base, dv_base, stride_o, scale, grad_scale = both
    low, totals = rows[5], walked[3]
    row, exists = rows_of_part(rows, PART, as_rows(BLOCK_D))
    position, valid = rows_of_part(rows, PART, gl.SliceLayout(1, product(BLOCK_N)))
    k, v = own_rows(
        keys, row - low, exists, k_base, stride_k, v_base, stride_v, PART, HEAD_DIM, BLOCK_D, BLOCK_N, WIDE
    )  # fmt: skip
    dk, dv = zeros(ROWS, BLOCK_D), zeros(ROWS, BLOCK_D)
    bound = gl.zeros([ROWS], gl.int32, gl.SliceLayout(1, product(BLOCK_N)))
    number, left, mine, full, bias = 0, 0, 0, 0, 0.0
    for done in range(gl.load(totals + 1 + PART)):
        walked, number, left, mine, full, bound, bias = next_step(
            ring, walked, position, valid, number, left, mine, full, bound, bias, PART, PARTS, BLOCK_N, STAGES, SHIFTS
        )  # fmt: skip
        q, dout, levels = wait_for_step(ring, number, STAGES)
        scores, dp = begin_step(k, q, v, dout, levels, ones, BLOCK_N)
        p = where_met(gl.exp2(scores * scale + bias), 0.0, full, bound, SPLIT)
        dk, dv = finish_step(ring, hand, number, done, p, dp, q, dout, dk, dv, BLOCK_D, STAGES)
        number, left, mine, full, bound = after_step(number, left, mine, full, bound, BLOCK_N)
    for other in range(number, gl.load(totals)):
        pass_over(ring, other, STAGES)
    store_rows(dk_base, row - low, stride_o, exists, times(dk, grad_scale), HEAD_DIM, BLOCK_D, WIDE)
    store_rows(dv_base, row - low, stride_o, exists, dv, HEAD_DIM, BLOCK_D, WIDE)


@gluon.jit
def _add_queries(
    given, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, WIDE: gl.constexpr,
    SHIFTS: gl.constexpr,
):  # fmt: skip
    """Adds what the parts that meet a step find to dq of its columns."""
    first_hand, second_hand, keys, walked, base, stride = given
    walks, biases, runs, totals, low, high = walked
    offset = gl.arange(0, BLOCK_N, gl.SliceLayout(1, _sums_in_memory(width_of(BLOCK_D, 0))))
    begin, step, left, first, second, first_done, second_done = 0, 0, 0, 0, 0, 0, 0
    for _ in range(gl.load(totals)):
        if left <= 0:
            begin, step, left, _full, _bound, _bias = next_run(runs, walks, biases, 0, True, low, high, SHIFTS)
            first = gl.load(runs + 4)
            second = gl.load(runs + 6)
            runs += 4 + 2 * PARTS
        dq = zeros(BLOCK_N, BLOCK_D)
        if first > 0:
            dq = add_product(dq, first_hand, first_done, of_slot(keys, 0))
            first_done += 1
        if second > 0:
            dq = add_product(dq, second_hand, second_done, of_slot(keys, 1))
            second_done += 1
        _add_rows(base, begin + offset * step, stride, offset < left, dq, HEAD_DIM, BLOCK_D, WIDE)
        begin += BLOCK_N * step
        left -= BLOCK_N
        first -= BLOCK_N
        second -= BLOCK_N


@gluon.jit(do_not_specialize=AS_THEY_ARE)
def gradients(
    q_ptr, k_ptr, v_ptr, dout_ptr, levels_ptr, sums_ptr, dk_ptr, dv_ptr,
    head_kind, slot_group, slot_index, group_size, group_start, residues, walks, biases, run_start, runs, totals,
    documents, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_sb, stride_ss, stride_sh, stride_ob, stride_os, stride_oh,
    q_low, q_high, k_low, k_high, origin, scale, grad_scale, num_heads, group_heads,
    period, groups, most_walks, blocks, block_runs,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    SPLIT: gl.constexpr, SHIFTS: gl.constexpr, PACKED: gl.constexpr,
    PART_REGISTERS: gl.constexpr, ADD_REGISTERS: gl.constexpr, FEED_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk and dv of 128 keys, as `gradients_of_keys`, and what they add to `sums_ptr`: dq (B, S, H, D) unscaled."""
    head, batch, first_row, first_column, rows, walked = place_of_program(
        num_heads, head_kind, slot_group, slot_index, group_size, group_start, residues, walks, biases, run_start,
        runs, totals, documents, k_low, k_high, q_low, q_high, origin, period, groups, most_walks, blocks,
        block_runs, PARTS, PACKED,
    )  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    ring, ones = make_ring(dtype, LEVELS, BLOCK_N, BLOCK_D, STAGES, PARTS), make_ones()
    keys = room_for_rows(dtype, PARTS, ROWS, BLOCK_D)
    first_hand, second_hand = make_hand(dtype, BLOCK_N), make_hand(dtype, BLOCK_N)
    key_head = head // group_heads
    k_base = k_ptr + batch * stride_kb + key_head * stride_kh + first_row * stride_ks
    v_base = v_ptr + batch * stride_vb + key_head * stride_vh + first_row * stride_vs
    q_base = q_ptr + batch * stride_qb + head * stride_qh + first_column * stride_qs
    g_base = dout_ptr + batch * stride_gb + head * stride_gh + first_column * stride_gs
    levels_base = levels_ptr + ((batch * num_heads + head) * (q_high - q_low) + first_column) * LEVEL_COLUMNS
    place = batch * stride_ob + head * stride_oh + first_row * stride_os
    both = (
        keys, walked, rows, k_base, stride_ks, v_base, stride_vs, dk_ptr + place, dv_ptr + place, stride_os,
        scale, grad_scale,
    )  # fmt: skip
    feed = (ring, walked, (q_base, stride_qs, g_base, stride_gs, levels_base))
    sums_base = sums_ptr + batch * stride_sb + head * stride_sh + first_column * stride_ss
    add = (first_hand, second_hand, keys, walked, sums_base, stride_ss)
    gl.warp_specialize(
        [
            (_part, ((ring, first_hand, ones, both), 0, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, SPLIT, SHIFTS)),
            (_part, ((ring, second_hand, ones, both), 1, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, SPLIT, SHIFTS)),
            (_add_queries, (add, HEAD_DIM, BLOCK_D, BLOCK_N, WIDE, SHIFTS)),
            (feed_runs, (feed, LEVELS, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, SHIFTS, PARTS)),
        ],
        [4, 4, 4],
        [PART_REGISTERS, ADD_REGISTERS, FEED_REGISTERS],
    )
