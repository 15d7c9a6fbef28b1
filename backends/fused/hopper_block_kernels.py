"""The forward pass over tables of blocks for Hopper, in Gluon: as that of `block_kernels`, with a ring that feeds.

A program takes 128 rows of a block row; steps are blocks, or parts of them: first those that count every pair alike,
then those with a mask of their own. Letters as in `addressing`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma_wait

from .addressing import AS_THEY_ARE
from .block_kernels import merge, row_of_program
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
    pieces,
    product,
    store_rows,
    tiles_of_step,
    wait_for_step,
)
from .hopper_steps import (
    add_columns,
    begin_adding,
    begin_product,
    bounded,
    finish_attending,
    have_come,
    no_sums,
    scores_of,
    shrunk,
    weigh_columns,
)

PARTS = gl.constexpr(2)


@gluon.jit
def place_of_program(
    num_heads, head_table, starts, cols, biases, mask_ids, masks, ends, documents, q_len, k_len, block_rows,
    batch_tables, leading, BLOCK: gl.constexpr, BLOCK_N: gl.constexpr, PACKED: gl.constexpr, IN_ORDER: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    """Of this program: head, batch row, the place of its sequence's first token in there, that sequence's queries and
    keys, the program's first row in the sequence and in the block, and its blocks.
    """
    head, tile, batch, place, block_row, q_len, k_len, first, masked, last = row_of_program(
        documents, head_table, starts, ends, num_heads, block_rows, batch_tables, leading, q_len, k_len,
        BLOCK // (PARTS * ROWS), PACKED, IN_ORDER,
    )  # fmt: skip
    steps: gl.constexpr = BLOCK // BLOCK_N
    blocks = (
        cols + first, biases + first, mask_ids + first, masks, (masked - first) * steps, (last - first) * steps,
    )  # fmt: skip
    inside = tile * (PARTS * ROWS)
    return head.to(gl.int64), batch, place, q_len, k_len, block_row * BLOCK + inside, inside, blocks


@gluon.jit
def first_of_step(blocks, number, BLOCK: gl.constexpr, BLOCK_N: gl.constexpr):
    """The first column of a step."""
    steps: gl.constexpr = BLOCK // BLOCK_N
    return gl.load(blocks[0] + number // steps) * BLOCK + (number % steps) * BLOCK_N


@gluon.jit
def feed_blocks(
    given, BESIDES: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Copies the columns of every step."""
    ring, blocks, fed, length = given
    offsets = columns_of_step(BLOCK_N, BLOCK_D)
    of_besides = gl.arange(0, BLOCK_N, copied_besides(BESIDES))
    for number in range(blocks[5]):
        begin = first_of_step(blocks, number, BLOCK, BLOCK_N)
        rows = [gl.minimum(begin + offset, length - 1) for offset in offsets]
        rows_besides = gl.minimum(begin + of_besides, length - 1)
        feed_step(ring, number, fed, rows, rows_besides, BESIDES, HEAD_DIM, BLOCK_D, STAGES, WIDE)


@gluon.jit
def _mask_of_step(blocks, number, entry, IN_ORDER: gl.constexpr):
    """The mask of a step, which has none before those that do unless blocks are IN_ORDER."""
    mask = -1
    if IN_ORDER or number >= blocks[4]:
        mask = gl.load(blocks[2] + entry)
    return mask


@gluon.jit
def where_masked(
    scores, masks, mask, inside, first, IS_TRANSPOSED: gl.constexpr, BLOCK: gl.constexpr, BLOCK_N: gl.constexpr
):  # fmt: skip
    """Scores where a mask lets a pair through, else -inf: of rows at `inside` (64,) and columns from `first` on."""
    words: gl.constexpr = BLOCK // 32
    place = masks + ((mask * 2 + (1 if IS_TRANSPOSED else 0)) * BLOCK + inside) * words + first // 32
    offset = gl.arange(0, BLOCK_N, gl.SliceLayout(0, product(BLOCK_N)))[None, :]
    word = gl.load(place)[:, None]
    for i in gl.static_range(1, BLOCK_N // 32):
        word = gl.where(offset >= 32 * i, gl.load(place + i)[:, None], word)
    return gl.where((word >> (offset & 31)) & 1 != 0, scores, -float("inf"))


@gluon.jit
def bias_and_scores(
    scores, blocks, number, inside, length,
    IS_TRANSPOSED: gl.constexpr, IN_ORDER: gl.constexpr, BLOCK: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The bias of a step, and its scores with its mask, of rows at `inside` (64,) of the block.

    IN_ORDER blocks with and without a mask are not apart, and only the first `length` columns are met.
    """
    _cols, biases, _mask_ids, masks, _full, _total = blocks
    steps: gl.constexpr = BLOCK // BLOCK_N
    entry = number // steps
    bias, mask = gl.load(biases + entry), _mask_of_step(blocks, number, entry, IN_ORDER)
    if mask >= 0:
        first = (number % steps) * BLOCK_N
        scores = where_masked(scores, masks, mask, inside, first, IS_TRANSPOSED, BLOCK, BLOCK_N)
    if IN_ORDER:
        met = length - first_of_step(blocks, number, BLOCK, BLOCK_N)
        if met < BLOCK_N:
            offset = gl.arange(0, BLOCK_N, gl.SliceLayout(0, product(BLOCK_N)))
            scores = gl.where((offset < met)[None, :], scores, -float("inf"))
    return bias, scores


@gluon.jit
def _weigh_step(
    scores, blocks, number, inside, length, row_sum, row_max, scale, dtype: gl.constexpr, FIXED: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK: gl.constexpr, IN_ORDER: gl.constexpr,
):  # fmt: skip
    """`weigh_columns` of a step."""
    bias, scores = bias_and_scores(scores, blocks, number, inside, length, False, IN_ORDER, BLOCK, BLOCK_N)
    return weigh_columns(scores, row_sum, row_max, scale, bias, 0, 0, dtype, FIXED, False, False, BLOCK_D)


@gluon.jit
def _attend_steps(
    q, ring, blocks, inside, length, out, row_sum, row_max, scale, FIXED: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr, IN_ORDER: gl.constexpr,
):  # fmt: skip
    """The sums over all steps.

    Beyond head_dim 64 values of a step are added under the exponentials of the next: scores of one and weights of
    another are then held at once, for which head_dim 64 has no registers, two of whose programs share a multiprocessor.
    """
    if BLOCK_D <= 64:
        for number in range(blocks[5]):
            k, v, _besides = wait_for_step(ring, number, STAGES)
            p, shrink, row_sum, row_max = _weigh_step(
                scores_of(q, k, BLOCK_N), blocks, number, inside, length, row_sum, row_max, scale, q[0].dtype,
                FIXED, BLOCK_D, BLOCK_N, BLOCK, IN_ORDER,
            )  # fmt: skip
            out = add_columns(p, v, shrunk(out, shrink, FIXED))
            free_step(ring, number, STAGES)
    elif blocks[5] > 0:
        k, _v, _besides = wait_for_step(ring, 0, STAGES)
        p, shrink, row_sum, row_max = _weigh_step(
            scores_of(q, k, BLOCK_N), blocks, 0, inside, length, row_sum, row_max, scale, q[0].dtype,
            FIXED, BLOCK_D, BLOCK_N, BLOCK, IN_ORDER,
        )  # fmt: skip
        for number in range(1, blocks[5]):
            k, _v, _besides = wait_for_step(ring, number, STAGES)
            _k, v, _besides = tiles_of_step(ring, number - 1, STAGES)
            scores = begin_product(q, k, BLOCK_N)
            out = begin_adding(p, v, out)
            scores = warpgroup_mma_wait(pieces(BLOCK_D), deps=[scores])
            p, shrink, row_sum, row_max = _weigh_step(
                scores, blocks, number, inside, length, row_sum, row_max, scale, q[0].dtype,
                FIXED, BLOCK_D, BLOCK_N, BLOCK, IN_ORDER,
            )  # fmt: skip
            out = shrunk(have_come(out), shrink, FIXED)
            free_step(ring, number - 1, STAGES)
        _k, v, _besides = tiles_of_step(ring, blocks[5] - 1, STAGES)
        out = add_columns(p, v, out)
        free_step(ring, blocks[5] - 1, STAGES)
    return out, row_sum, row_max


@gluon.jit
def _merge_piece(there, lse_there, out, lse):
    of_rows: gl.constexpr = gl.SliceLayout(1, out.type.layout)
    there = gl.convert_layout(there.to(gl.float32), out.type.layout)
    return merge(there, gl.convert_layout(lse_there, of_rows), out, gl.convert_layout(lse, of_rows))


@gluon.jit
def _merge_rows(there, lse_there, out, lse):
    """`merge` of rows that are there, as memory has them, and what is found of them."""
    merged = [_merge_piece(there[piece], lse_there, out[piece], lse) for piece in (0, 1)[: len(out)]]
    return [x[0] for x in merged], gl.convert_layout(merged[0][1], lse.type.layout)


@gluon.jit
def _attend_part(
    given, PART: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, BLOCK: gl.constexpr, ADDS: gl.constexpr, BOUNDED: gl.constexpr,
    IN_ORDER: gl.constexpr,
):  # fmt: skip
    """Out and lse of the rows of a part."""
    ring, blocks, first, inside, q_base, stride_q, out_base, stride_o, lse_base, largest, length, keys, scale = given
    row = first + PART * ROWS + gl.arange(0, ROWS, as_rows(BLOCK_D))
    of_scores = PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, product(BLOCK_N)))
    x = load_rows(q_base, row, stride_q, row < length, HEAD_DIM, BLOCK_D, WIDE)
    q = in_shared(x)
    fence_async_shared()
    out, row_sum, row_max = no_sums(BLOCK_N, BLOCK_D)
    is_bounded = False
    if BOUNDED:
        is_bounded, row_max = bounded(x, largest, row_max, scale)
        if is_bounded:
            out, row_sum, row_max = _attend_steps(
                q, ring, blocks, inside + of_scores, keys, out, row_sum, row_max, scale,
                True, BLOCK_D, BLOCK_N, STAGES, BLOCK, IN_ORDER,
            )  # fmt: skip
    if not is_bounded:
        out, row_sum, row_max = _attend_steps(
            q, ring, blocks, inside + of_scores, keys, out, row_sum, row_max, scale,
            False, BLOCK_D, BLOCK_N, STAGES, BLOCK, IN_ORDER,
        )  # fmt: skip
    out, lse = finish_attending(out, row_sum, row_max)
    exists, place = first + of_scores < length, lse_base + first + of_scores
    if ADDS:
        if blocks[5] > 0:
            there = load_rows(out_base, row, stride_o, row < length, HEAD_DIM, BLOCK_D, WIDE)
            lse_there = gl.load(place, mask=exists, other=0.0)
            out, lse = _merge_rows(there, lse_there, out, lse)
            store_rows(out_base, row, stride_o, row < length, out, HEAD_DIM, BLOCK_D, WIDE)
            gl.store(place, lse, mask=exists)
    else:
        store_rows(out_base, row, stride_o, row < length, out, HEAD_DIM, BLOCK_D, WIDE)
        gl.store(place, lse, mask=exists)


@gluon.jit(do_not_specialize=AS_THEY_ARE)
def attend_blocks(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, largest_ptr, head_table, starts, cols, biases, mask_ids, masks,
    ends, documents, stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ob, stride_os, stride_oh, q_len, k_len, scale, num_heads, group_heads, block_rows, batch_tables, leading,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    BLOCK: gl.constexpr, ADDS: gl.constexpr, BOUNDED: gl.constexpr, PACKED: gl.constexpr, IN_ORDER: gl.constexpr,
    PART_REGISTERS: gl.constexpr, FEED_REGISTERS: gl.constexpr,
):  # fmt: skip
    """As `block_kernels.attend_blocks`, of tiles of 128 rows, and with the bound of scores that `kernels` have."""
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
        out_ptr + batch * stride_ob + head * stride_oh + place * stride_os, stride_os,
        lse_ptr + (batch * num_heads + head) * q_len + place,
        largest_ptr + batch * (num_heads // group_heads) + key_head, queries, keys, scale,
    )  # fmt: skip
    feed = (ring, blocks, (k_base, stride_ks, v_base, stride_vs, k_ptr), keys)
    gl.warp_specialize(
        [
            (_attend_part, (part, 0, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, BLOCK, ADDS, BOUNDED, IN_ORDER)),
            (_attend_part, (part, 1, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, BLOCK, ADDS, BOUNDED, IN_ORDER)),
            (feed_blocks, (feed, NOTHING, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES, WIDE, BLOCK)),
        ],
        [4, 4],
        [PART_REGISTERS, FEED_REGISTERS],
    )
