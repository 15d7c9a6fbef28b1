"""Pieces of strided rows put together in one pass, in Triton; see `joining`, which launches it.

Letters: M positions of a tile, D head_dim. A program has a tile of positions of one head; `places` has for each piece
the integers of `joining.fields_of`. Pieces are compact, (N, C, H, D) and their lse (N, H, C): N elements of C rows of
H heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Numbers that kernels take as they are: one compiled for a length, or for places, would serve no other.
AS_THEY_ARE = ("places", "length", "num_heads")


@triton.jit
def divided(x, multiplier, log):
    """x // d for 0 <= x < 2^30, with the multiplier and log of `joining.reciprocal`."""
    return (tl.umulhi(x.to(tl.uint32) * 2, multiplier.to(tl.uint32, bitcast=True)) >> log).to(tl.int32)


@triton.jit
def tile_of(length, num_heads, BLOCK_M: tl.constexpr):
    """Which head and batch row a program has, and which positions (M,); heads of a tile follow one another."""
    tiles = tl.cdiv(length, BLOCK_M)
    block = tl.program_id(0) // num_heads
    return tl.program_id(0) % num_heads, block // tiles, block % tiles * BLOCK_M + tl.arange(0, BLOCK_M)


@triton.jit
def head_of(place, head, batch):
    """Which head of a piece is this one, and whether it has it at all."""
    first_batch, batches = place[0]
    first, step, multiplier, log, count, _ = place[1]
    t = divided(tl.maximum(head - first, 0), multiplier, log)
    has_batch = (batch >= first_batch) & (batch < first_batch + batches)
    return t, has_batch & (t * step == head - first) & (t < count)


@triton.jit
def rows_of(place, t, batch, position):
    """Where the positions stand in head t of a piece: their element (M,), row of it (M,), and which are in it (M,)."""
    first_batch, _ = place[0]
    _, _, _, _, _, shift = place[1]
    start, segments, segment_step, segment_multiplier, segment_log, step, multiplier, log, count = place[2]
    offset = position - (start + t * shift)
    known = tl.maximum(offset, 0)
    segment = divided(known, segment_multiplier, segment_log)
    within = known - segment * segment_step
    row = divided(within, multiplier, log)
    is_in = (offset >= 0) & (segment < segments) & (row < count) & (row * step == within)
    return (batch - first_batch) * segments + segment, row, is_in


@triton.jit
def size_of(place):
    """How many rows each element of a piece has, and how many heads."""
    return place[2][8], place[1][4]


@triton.jit
def pointers_to(base, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr):
    """Half the columns of rows (M,), and which of them there are: a thread then has half as many rows to find."""
    column = PART * (BLOCK_D // 2) + tl.arange(0, BLOCK_D // 2)
    return base + (rows.to(tl.int64) * HEAD_DIM)[:, None] + column[None, :], (column < HEAD_DIM)[None, :]


@triton.jit
def load_rows(base, rows, is_in, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows in float32, in two halves (M, D / 2); zeros where they are not in the piece."""
    left, is_left = pointers_to(base, rows, HEAD_DIM, BLOCK_D, 0)
    right, is_right = pointers_to(base, rows, HEAD_DIM, BLOCK_D, 1)
    x = tl.load(left, mask=is_in[:, None] & is_left, other=0.0)
    y = tl.load(right, mask=is_in[:, None] & is_right, other=0.0)
    return x.to(tl.float32), y.to(tl.float32)


@triton.jit
def store_rows(base, rows, is_in, x, y, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the two halves of rows, in their dtype."""
    left, is_left = pointers_to(base, rows, HEAD_DIM, BLOCK_D, 0)
    right, is_right = pointers_to(base, rows, HEAD_DIM, BLOCK_D, 1)
    tl.store(left, x.to(base.dtype.element_ty), mask=is_in[:, None] & is_left)
    tl.store(right, y.to(base.dtype.element_ty), mask=is_in[:, None] & is_right)


@triton.jit(do_not_specialize=AS_THEY_ARE)
def merge_pieces(
    out_ptr, lse_ptr, outs, lses, places, length, num_heads,
    COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Out and lse of one tile, by the online softmax over the pieces that have its rows."""
    head, batch, position = tile_of(length, num_heads, BLOCK_M)
    left = tl.zeros([BLOCK_M, BLOCK_D // 2], tl.float32)
    right = tl.zeros([BLOCK_M, BLOCK_D // 2], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for i in tl.static_range(COUNT):
        t, has_head = head_of(places[i], head, batch)
        if has_head:
            element, row, is_in = rows_of(places[i], t, batch, position)
            num_rows, heads = size_of(places[i])
            lse = tl.load(lses[i] + (element * heads + t) * num_rows + row, mask=is_in, other=-float("inf"))
            x, y = load_rows(outs[i], (element * num_rows + row) * heads + t, is_in, HEAD_DIM, BLOCK_D)
            new_max = tl.maximum(row_max, lse)
            shift = tl.where(new_max == -float("inf"), 0.0, new_max)
            shrink, share = tl.exp(row_max - shift), tl.exp(lse - shift)
            left = left * shrink[:, None] + x * share[:, None]
            right = right * shrink[:, None] + y * share[:, None]
            row_sum = row_sum * shrink + share
            row_max = new_max
    is_empty = row_sum == 0  # of NaN it is not, which stays
    counted = tl.where(is_empty, 1.0, row_sum)
    lse = tl.where(is_empty, -float("inf"), row_max + tl.log(counted))
    left, right = left / counted[:, None], right / counted[:, None]
    is_here = position < length
    store_rows(out_ptr, (batch * length + position) * num_heads + head, is_here, left, right, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + (batch * num_heads + head) * length + position, lse, mask=is_here)


@triton.jit(do_not_specialize=AS_THEY_ARE)
def add_pieces(
    total_ptr, pieces, places, length, num_heads,
    COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The sum of the pieces that have the rows of one tile."""
    head, batch, position = tile_of(length, num_heads, BLOCK_M)
    left = tl.zeros([BLOCK_M, BLOCK_D // 2], tl.float32)
    right = tl.zeros([BLOCK_M, BLOCK_D // 2], tl.float32)
    for i in tl.static_range(COUNT):
        t, has_head = head_of(places[i], head, batch)
        if has_head:
            element, row, is_in = rows_of(places[i], t, batch, position)
            num_rows, heads = size_of(places[i])
            x, y = load_rows(pieces[i], (element * num_rows + row) * heads + t, is_in, HEAD_DIM, BLOCK_D)
            left += x
            right += y
    rows = (batch * length + position) * num_heads + head
    store_rows(total_ptr, rows, position < length, left, right, HEAD_DIM, BLOCK_D)
