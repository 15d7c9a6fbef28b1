"""All gradients in one launch over tables of blocks, for Hopper, in Gluon: as `hopper_joint_kernels` over branches.

Letters as in `addressing`; rows and blocks as in `hopper_block_kernels`.
"""

from __future__ import annotations

from functools import cache

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .addressing import AS_THEY_ARE
from .gradient_kernels import LEVEL_COLUMNS
from .hopper_block_kernels import (
    bias_and_scores,
    feed_blocks,
    first_of_step,
    place_of_program,
)
from .hopper_joint_kernels import PARTS, add_product, begin_step, finish_step, make_hand, make_ones, own_rows
from .hopper_ring import (
    LEVELS,
    ROWS,
    as_rows,
    make_ring,
    of_slot,
    pieces,
    product,
    room_for_rows,
    start_of,
    store_rows,
    wait_for_step,
    width_of,
)
from .hopper_steps import times, zeros


@gluon.constexpr_function
def _boxes(width):
    """Layout of sums of that width, as they are added."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 4 * width), element_bitwidth=32, rank=4)


def boxes_of_sums(sums, rows, width):
    """How so many rows of one head are found in sums (B, S, H, D), for each piece; what reaches beyond is not added.

    A single piece has the same box twice.
    """
    boxes = [TensorDescriptor.from_tensor(sums, [1, rows, 1, each], layout) for each, layout in _layouts(width)]
    return boxes[0], boxes[-1]


@cache
def _layouts(width):
    """The width of each piece, and how its boxes lie: found once, for launches wait for it."""
    widths = [width_of(width, piece) for piece in range(pieces(width))]
    return tuple((each, _boxes(each)) for each in widths)


@builtin
def _reduce(box, place, tile, _semantic=None):
    """What Triton calls `tma.async_atomic_add` from 3.8 on."""
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, box.handle, place, tile.handle)


_add_tile = getattr(tma, "async_atomic_add", _reduce)


@gluon.jit
def _block_part(
    given, PART: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, BLOCK: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """dk and dv of the rows of a part."""
    ring, hand, ones, both = given
    (keys, blocks, first, inside, length, queries, k_base, stride_k, v_base, stride_v, dk_base, dv_base, stride_o,
     scale, grad_scale) = both  # fmt: skip
    row = first + PART * ROWS + gl.arange(0, ROWS, as_rows(BLOCK_D))
    of_scores = PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, product(BLOCK_N)))
    k, v = own_rows(
        keys, row, row < length, k_base, stride_k, v_base, stride_v, PART, HEAD_DIM, BLOCK_D, BLOCK_N, WIDE
    )  # fmt: skip
    dk, dv = zeros(ROWS, BLOCK_D), zeros(ROWS, BLOCK_D)
    for number in range(blocks[5]):
        q, dout, levels = wait_for_step(ring, number, STAGES)
        scores, dp = begin_step(k, q, v, dout, levels, ones, BLOCK_N)
        bias, scores = bias_and_scores(
            scores, blocks, number, inside + of_scores, queries, True, PACKED, BLOCK, BLOCK_N
        )  # fmt: skip
        p = gl.exp2(scores * scale + bias)
        dk, dv = finish_step(ring, hand, number, number, p, dp, q, dout, dk, dv, BLOCK_D, STAGES)
    store_rows(dk_base, row, stride_o, row < length, times(dk, grad_scale), HEAD_DIM, BLOCK_D, WIDE)
    store_rows(dv_base, row, stride_o, row < length, dv, HEAD_DIM, BLOCK_D, WIDE)


@gluon.jit
def _room_for_sums(BLOCK_N: gl.constexpr, WIDTH: gl.constexpr):
    return gl.allocate_shared_memory(gl.float32, [2, 1, BLOCK_N, 1, WIDTH], _boxes(WIDTH))


@gluon.jit
def _first_rows(x, count):
    """So many rows of x, and zeros in the place of the others."""
    row = gl.arange(0, x.shape[0], gl.SliceLayout(1, x.type.layout))
    return gl.where((row < count)[:, None], x, 0.0)


@gluon.jit
def _add_block_queries(
    given, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK: gl.constexpr, PACKED: gl.constexpr
):  # fmt: skip
    """Adds what both parts find in every step to dq of its columns, by copies that go on beside the next step.

    Columns of a step are neighbours here, so that one copy adds them, by TMA: those of a run may be far apart.
    """
    first_hand, second_hand, keys, blocks, boxes, batch, start, head, queries = given
    tiles = [_room_for_sums(BLOCK_N, width_of(BLOCK_D, piece)) for piece in (0, 1)[: pieces(BLOCK_D)]]
    for number in range(blocks[5]):
        row = first_of_step(blocks, number, BLOCK, BLOCK_N)
        dq = zeros(BLOCK_N, BLOCK_D)
        dq = add_product(dq, first_hand, number, of_slot(keys, 0))
        dq = add_product(dq, second_hand, number, of_slot(keys, 1))
        if row + BLOCK_N > queries if PACKED else False:  # what follows is another document's: no NaN may reach it
            dq = [_first_rows(x, queries - row) for x in dq]
        tma.store_wait(pieces(BLOCK_D))  # for what was added from these tiles
        for piece in gl.static_range(pieces(BLOCK_D)):
            tiles[piece].index(number % 2).reshape(dq[piece].shape).store(dq[piece])
        fence_async_shared()
        place = (start + row).to(gl.int32)
        for piece in gl.static_range(pieces(BLOCK_D)):
            _add_tile(boxes[piece], [batch, place, head, start_of(BLOCK_D, piece)], tiles[piece].index(number % 2))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=AS_THEY_ARE)
def block_gradients(
    q_ptr, k_ptr, v_ptr, dout_ptr, levels_ptr, sums, more_sums, dk_ptr, dv_ptr,
    head_table, starts, cols, biases, mask_ids, masks, ends, documents,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    q_len, k_len, scale, grad_scale, num_heads, group_heads, block_rows, batch_tables, leading,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    BLOCK: gl.constexpr, PACKED: gl.constexpr,
    PART_REGISTERS: gl.constexpr, ADD_REGISTERS: gl.constexpr, FEED_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `gradients`, over a table of blocks; `sums` and `more_sums` are `boxes_of_sums`."""
    head, batch, start, queries, key_rows, first, inside, blocks = place_of_program(
        num_heads, head_table, starts, cols, biases, mask_ids, masks, ends, documents, q_len, k_len, block_rows,
        batch_tables, leading, BLOCK, BLOCK_N, PACKED, PACKED, PARTS,
    )  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    ring, ones = make_ring(dtype, LEVELS, BLOCK_N, BLOCK_D, STAGES, PARTS), make_ones()
    keys = room_for_rows(dtype, PARTS, ROWS, BLOCK_D)
    first_hand, second_hand = make_hand(dtype, BLOCK_N), make_hand(dtype, BLOCK_N)
    key_head = head // group_heads
    k_base = k_ptr + batch * stride_kb + key_head * stride_kh + start * stride_ks
    v_base = v_ptr + batch * stride_vb + key_head * stride_vh + start * stride_vs
    q_base = q_ptr + batch * stride_qb + head * stride_qh + start * stride_qs
    g_base = dout_ptr + batch * stride_gb + head * stride_gh + start * stride_gs
    place = batch * stride_ob + head * stride_oh + start * stride_os
    both = (
        keys, blocks, first, inside, key_rows, queries, k_base, stride_ks, v_base, stride_vs,
        dk_ptr + place, dv_ptr + place, stride_os, scale, grad_scale,
    )  # fmt: skip
    levels_base = levels_ptr + ((batch * num_heads + head) * q_len + start) * LEVEL_COLUMNS
    feed = (ring, blocks, (q_base, stride_qs, g_base, stride_gs, levels_base), queries)
    batch, boxes = batch.to(gl.int32), (sums, more_sums)
    add = (first_hand, second_hand, keys, blocks, boxes, batch, start, head.to(gl.int32), queries)
    part, other = (ring, first_hand, ones, both), (ring, second_hand, ones, both)
    gl.warp_specialize(
        [
            (_block_part, (part, 0, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, BLOCK, PACKED)),
            (_block_part, (other, 1, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, BLOCK, PACKED)),
            (_add_block_queries, (add, BLOCK_D, BLOCK_N, BLOCK, PACKED)),
            (feed_blocks, (feed, LEVELS, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, BLOCK)),
        ],
        [4, 4, 4],
        [PART_REGISTERS, ADD_REGISTERS, FEED_REGISTERS],
    )
