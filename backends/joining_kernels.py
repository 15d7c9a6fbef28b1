"""Pieces of strided rows put together in one pass, in Triton; see `joining`, which launches it.

Letters: M positions of a tile, D head_dim. A program has a tile of positions of one head; `places` is a flat tuple of
`FIELDS` integers for each piece, in the order of `joining.fields_of`. Pieces are compact, (N, C, H, D) and their lse
(N, H, C): N elements of C rows of H heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = tl.constexpr(17)
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
def head_of(places, AT: tl.constexpr, head, batch):
    """Which head of a piece is this one, and whether it has it at all."""
    b, h = batch - places[AT], head - places[AT + 2]
    t = divided(tl.maximum(h, 0), places[AT + 4], places[AT + 5])
    return t, (b >= 0) & (b < places[AT + 1]) & (t * places[AT + 3] == h) & (t < places[AT + 6])


@triton.jit
def rows_of(places, AT: tl.constexpr, t, batch, position):
    """Where the positions stand in head t of a piece: their element (M,), row of it (M,), and which are in it (M,)."""
    offset = position - (places[AT + 8] + t * places[AT + 7])
    known = tl.maximum(offset, 0)
    segment = divided(known, places[AT + 11], places[AT + 12])
    within = known - segment * places[AT + 10]
    row = divided(within, places[AT + 14], places[AT + 15])
    is_in = (offset >= 0) & (segment < places[AT + 9]) & (row < places[AT + 16]) & (row * places[AT + 13] == within)
    return (batch - places[AT]) * places[AT + 9] + segment, row, is_in


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
    outs, lses, places, out_ptr, lse_ptr, length, num_heads,
    COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Out and lse of one tile, by the online softmax over the pieces that have its rows."""
    head, batch, position = tile_of(length, num_heads, BLOCK_M)
    left = tl.zeros([BLOCK_M, BLOCK_D // 2], tl.float32)
    right = tl.zeros([BLOCK_M, BLOCK_D // 2], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for i in tl.static_range(COUNT):
        t, has_head = head_of(places, i * FIELDS, head, batch)
        if has_head:
            element, row, is_in = rows_of(places, i * FIELDS, t, batch, position)
            num_rows, heads = places[i * FIELDS + 16], places[i * FIELDS + 6]
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
    pieces, places, total_ptr, length, num_heads,
    COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The sum of the pieces that have the rows of one tile."""
    head, batch, position = tile_of(length, num_heads, BLOCK_M)
    left = tl.zeros([BLOCK_M, BLOCK_D // 2], tl.float32)
    right = tl.zeros([BLOCK_M, BLOCK_D // 2], tl.float32)
    for i in tl.static_range(COUNT):
        t, has_head = head_of(places, i * FIELDS, head, batch)
        if has_head:
            element, row, is_in = rows_of(places, i * FIELDS, t, batch, position)
            rows = (element * places[i * FIELDS + 16] + row) * places[i * FIELDS + 6] + t
            x, y = load_rows(pieces[i], rows, is_in, HEAD_DIM, BLOCK_D)
            left += x
            right += y
    rows = (batch * length + position) * num_heads + head
    store_rows(total_ptr, rows, position < length, left, right, HEAD_DIM, BLOCK_D)
