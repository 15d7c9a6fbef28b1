"""The forward pass over branches for Hopper, in Gluon: as that of `kernels`, with a ring that feeds.

A part passes over steps whose columns none of its rows meets: `runs` says which. Letters as in `addressing`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .addressing import AS_THEY_ARE, columns, next_run, place_of_runs, sequence_of, tile_and_head
from .hopper_ring import (
    NOTHING,
    ROWS,
    as_rows,
    columns_of_step,
    copied_besides,
    feed_step,
    free_step,
    in_shared,
    load_rows,
    make_ring,
    pass_over,
    product,
    store_rows,
    wait_for_step,
)
from .hopper_steps import attend_columns, bounded, finish_attending, no_sums, scores_of


@gluon.jit
def place_of_program(
    num_heads, head_kind, slot_group, slot_index, group_size, group_start, residues, walks, biases, run_start, runs,
    totals, documents, low, high, low_column, high_column, origin, period, groups, most_walks, blocks, block_runs,
    PARTS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Of this program: head, batch row, its sequence's first row and column in there, its rows, and what they walk."""
    tile, head = tile_and_head(num_heads)
    kind = gl.load(head_kind + head)
    group = kind * groups + gl.load(slot_group + kind * period + tile % period)
    place, total_place = place_of_runs(kind, tile, run_start, blocks, period, block_runs, PARTS)
    slot = kind * period + tile % period
    batch, first_row, first_column, low, high, low_column, high_column, origin = sequence_of(
        documents, tile // period, low, high, low_column, high_column, origin, (PARTS * ROWS) * period, PACKED
    )  # fmt: skip
    rows = (
        origin, gl.load(slot_index + slot) * (PARTS * ROWS),
        gl.load(group_size + group), residues + kind * period + gl.load(group_start + group), period, low, high,
    )  # fmt: skip
    walked = (
        walks + group * most_walks * 9, biases + group * most_walks, runs + place, totals + total_place,
        low_column, high_column,
    )  # fmt: skip
    return head.to(gl.int64), batch, first_row, first_column, rows, walked


@gluon.jit
def rows_of_part(rows, PART: gl.constexpr, LAYOUT: gl.constexpr):
    """As `addressing.tile_of_rows`, of one part and in that layout: positions, and which of them are valid."""
    first, element, size, residues, period, low, high = rows
    element += PART * ROWS + gl.arange(0, ROWS, LAYOUT)
    position = first + (element // size) * period + gl.load(residues + element % size)
    return position, (position >= low) & (position < high)


@gluon.jit
def feed_runs(
    given, BESIDES: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, SHIFTS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Copies the columns of every step."""
    ring, walked, fed = given
    walks, biases, runs, totals, low, high = walked
    offsets = columns_of_step(BLOCK_N, BLOCK_D)
    of_besides = gl.arange(0, BLOCK_N, copied_besides(BESIDES))
    begin, step, left = 0, 0, 0
    for number in range(gl.load(totals)):
        if left <= 0:
            begin, step, left, _full, _bound, _bias = next_run(runs, walks, biases, 0, True, low, high, SHIFTS)
            runs += 4 + 2 * PARTS
        rows = [begin + gl.minimum(offset, left - 1) * step for offset in offsets]
        rows_besides = begin + gl.minimum(of_besides, left - 1) * step
        feed_step(ring, number, fed, rows, rows_besides, BESIDES, HEAD_DIM, BLOCK_D, STAGES, WIDE)
        begin += BLOCK_N * step
        left -= BLOCK_N


@gluon.jit
def next_step(
    ring, walked, position, valid, number, left, mine, full, bound, bias,
    PART: gl.constexpr, PARTS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SHIFTS: gl.constexpr,
):  # fmt: skip
    """Come to the next step that has columns of this part; of a single part every step has.

    `number` counts steps, `left` and `mine` are the columns left of the run that any row of the program and of this
    part meets, `full` those that every row of the part does.
    """
    walks, biases, runs, totals, low, high = walked
    if mine <= 0:
        if PARTS == 1:
            left = gl.load(runs + 2)
            mine = left
            runs += 4 + 2 * PARTS
        else:
            while mine <= 0:
                if left > 0:
                    pass_over(ring, number, STAGES)
                    number += 1
                    left -= BLOCK_N
                else:
                    left = gl.load(runs + 2)
                    mine = gl.load(runs + 4 + 2 * PART)
                    runs += 4 + 2 * PARTS
        run = runs - (4 + 2 * PARTS)
        index = gl.load(run)
        full = gl.load(run + 5 + 2 * PART)
        bias = gl.load(biases + index)
        _first, _step, bound = columns(walks + index * 9, gl.load(run + 1), position, valid, low, high, SHIFTS)
    return (walks, biases, runs, totals, low, high), number, left, mine, full, bound, bias


@gluon.jit
def after_step(number, left, mine, full, bound, BLOCK_N: gl.constexpr):
    """What `next_step` goes on from."""
    return number + 1, left - BLOCK_N, mine - BLOCK_N, full - BLOCK_N, bound - BLOCK_N


@gluon.jit
def _attend_steps(
    q, ring, walked, own, position, valid, out, row_sum, row_max, scale,
    PART: gl.constexpr, FIXED: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    SPLIT: gl.constexpr, SHIFTS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """The sums over the steps of a part, and how many it has come to."""
    bound = gl.zeros([ROWS], gl.int32, gl.SliceLayout(1, product(BLOCK_N)))
    number, left, mine, full, bias = 0, 0, 0, 0, 0.0
    for _ in range(own):
        walked, number, left, mine, full, bound, bias = next_step(
            ring, walked, position, valid, number, left, mine, full, bound, bias, PART, PARTS, BLOCK_N, STAGES, SHIFTS
        )  # fmt: skip
        k, v, _besides = wait_for_step(ring, number, STAGES)
        scores = scores_of(q, k, BLOCK_N)
        out, row_sum, row_max = attend_columns(
            scores, v, out, row_sum, row_max, scale, bias, full, bound, FIXED, SPLIT, BLOCK_D
        )  # fmt: skip
        free_step(ring, number, STAGES)
        number, left, mine, full, bound = after_step(number, left, mine, full, bound, BLOCK_N)
    return out, row_sum, row_max, number


@gluon.jit
def _attend_part(
    given, PART: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, SPLIT: gl.constexpr, SHIFTS: gl.constexpr, PARTS: gl.constexpr,
    BOUNDED: gl.constexpr,
):  # fmt: skip
    """Out and lse of the rows of a part."""
    ring, walked, rows, q_base, stride_q, out_base, stride_o, lse_base, largest, scale = given
    low, totals = rows[5], walked[3]
    row, exists = rows_of_part(rows, PART, as_rows(BLOCK_D))
    position, valid = rows_of_part(rows, PART, gl.SliceLayout(1, product(BLOCK_N)))
    x = load_rows(q_base, row - low, stride_q, exists, HEAD_DIM, BLOCK_D, WIDE)
    q = in_shared(x)
    fence_async_shared()
    out, row_sum, row_max = no_sums(BLOCK_N, BLOCK_D)
    own, number, is_bounded = gl.load(totals + 1 + PART), 0, False
    if BOUNDED:
        is_bounded, row_max = bounded(x, largest, row_max, scale)
        if is_bounded:
            out, row_sum, row_max, number = _attend_steps(
                q, ring, walked, own, position, valid, out, row_sum, row_max, scale,
                PART, True, BLOCK_D, BLOCK_N, STAGES, SPLIT, SHIFTS, PARTS,
            )  # fmt: skip
    if not is_bounded:
        out, row_sum, row_max, number = _attend_steps(
            q, ring, walked, own, position, valid, out, row_sum, row_max, scale,
            PART, False, BLOCK_D, BLOCK_N, STAGES, SPLIT, SHIFTS, PARTS,
        )  # fmt: skip
    for other in range(number, gl.load(totals)):
        pass_over(ring, other, STAGES)
    out, lse = finish_attending(out, row_sum, row_max)
    store_rows(out_base, row - low, stride_o, exists, out, HEAD_DIM, BLOCK_D, WIDE)
    gl.store(lse_base + position - low, lse, mask=valid)


@gluon.jit(do_not_specialize=AS_THEY_ARE)
def attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, largest_ptr,
    head_kind, slot_group, slot_index, group_size, group_start, residues, walks, biases, run_start, runs, totals,
    documents, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, q_low, q_high, k_low, k_high, origin, scale, num_heads, group_heads,
    period, groups, most_walks, blocks, block_runs,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    SPLIT: gl.constexpr, SHIFTS: gl.constexpr, PARTS: gl.constexpr, BOUNDED: gl.constexpr, PACKED: gl.constexpr,
    PART_REGISTERS: gl.constexpr, FEED_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `kernels.attend`, of tiles of 128 rows."""
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
        out_ptr + batch * stride_ob + head * stride_oh + first_row * stride_os, stride_os,
        lse_ptr + (batch * num_heads + head) * (q_high - q_low) + first_row,
        largest_ptr + batch * (num_heads // group_heads) + key_head, scale,
    )  # fmt: skip
    feed = (ring, walked, (k_base, stride_ks, v_base, stride_vs, k_ptr))
    gl.warp_specialize(
        [
            (_attend_part, (part, 0, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, SPLIT, SHIFTS, PARTS, BOUNDED)),
            (_attend_part, (part, 1, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, SPLIT, SHIFTS, PARTS, BOUNDED)),
            (feed_runs, (feed, NOTHING, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, SHIFTS, PARTS)),
        ],
        [4, 4],
        [PART_REGISTERS, FEED_REGISTERS],
    )
