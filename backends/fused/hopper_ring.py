"""What the kernels for Hopper share, in Gluon, Triton's lower dialect: rows in memory, and the ring that feeds them.

A program has one or two parts, four warps each that compute 64 rows, and four warps that feed them: these copy the
columns of every step into a ring of tiles in shared memory, once for both parts. A part waits for the ring and never
for the other one, so that products of one go on under the exponentials of the other.

Of two parts each waits for all that it has issued before it goes on to another step. A single one may leave the last
products under way: ptxas keeps that overlap only in the warps that the kernel begins with, and only if the sums under
way when a step begins can come from nowhere but the step before. Else it gives up every overlap ("serialized"):
`compile_hopper` in the tests. So where products of a step run under the exponentials of the next, they are issued with
the next one's, and a part holds the tiles of both: a ring has at least two stages.

Letters as in `addressing`. The columns of a step are rows (N, D) of two tensors, x and y: keys and values, or queries
and dout. With queries come what `gradient_kernels` keeps of their rows: pairs of numbers, or levels. Rows are tuples
of pieces, whose widths are powers of two and D together: what is computed in vain of a head_dim of 96 is nothing then,
of 128 columns a quarter.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .gradient_kernels import LEVEL_COLUMNS

ROWS = gl.constexpr(64)  # of a part
LINES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
LEVEL_TILES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2))
LEVELS_IN_MEMORY = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))  # 16 bytes a thread
# What a ring holds of columns besides x and y.
NOTHING = gl.constexpr(0)
PAIRS = gl.constexpr(1)
LEVELS = gl.constexpr(2)
_THREADS = gl.constexpr(128)  # of four warps
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared  # renamed in Triton 3.8


@gluon.constexpr_function
def pieces(width):
    """How many powers of two a width is the sum of: one or two."""
    return width.bit_count()


@gluon.constexpr_function
def width_of(width, piece):
    """That of a piece, the widest first."""
    widest = 1 << (width.bit_length() - 1)
    return width - widest if piece else widest


@gluon.constexpr_function
def start_of(width, piece):
    """Its first column."""
    return 1 << (width.bit_length() - 1) if piece else 0


@gluon.constexpr_function
def tiles_of(width):
    """Layout of rows of that width, of 16 bits each, as products read them."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * width), element_bitwidth=16, rank=2)


@gluon.constexpr_function
def product(columns):
    """Layout of a product of the rows of a part by so many columns."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def rows_in_memory(width):
    """Layout of rows of that width as memory is read and written, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def as_rows(width):
    """Layout of rows by themselves, as `load_rows` and `store_rows` take them."""
    return gl.SliceLayout(1, rows_in_memory(width_of(width, 0)))


@gluon.jit
def columns_of_step(BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr):
    """Numbers of the columns of a step, once for each piece."""
    return [
        gl.arange(0, BLOCK_N, gl.SliceLayout(1, rows_in_memory(width_of(BLOCK_D, piece))))
        for piece in (0, 1)[: pieces(BLOCK_D)]
    ]


@gluon.constexpr_function
def copied_besides(kind):
    """Layout of the columns whose pairs or levels are copied."""
    return gl.SliceLayout(1, LEVELS_IN_MEMORY.value) if kind == 2 else gl.BlockedLayout([1], [32], [4], [0])


@gluon.jit
def _pointers(base, rows, stride, PIECE: gl.constexpr, BLOCK_D: gl.constexpr, WIDE: gl.constexpr):
    """Of a piece of rows that begin at multiples of 16 bytes, as `launches` sees to, and its columns."""
    WIDTH: gl.constexpr = width_of(BLOCK_D, PIECE)
    LAYOUT: gl.constexpr = rows_in_memory(WIDTH)
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT)) + start_of(BLOCK_D, PIECE)
    rows = gl.convert_layout(rows, gl.SliceLayout(1, LAYOUT))
    if WIDE:
        rows = rows.to(gl.int64)
    return gl.multiple_of(base + (rows[:, None] * stride + column[None, :]), [1, 16]), column


@gluon.jit
def _load_piece(
    base, rows, stride, valid, PIECE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, WIDE: gl.constexpr
):  # fmt: skip
    pointers, column = _pointers(base, rows, stride, PIECE, BLOCK_D, WIDE)
    valid = gl.convert_layout(valid, gl.SliceLayout(1, pointers.type.layout))
    return gl.load(pointers, mask=valid[:, None] & (column < HEAD_DIM)[None, :], other=0.0)


@gluon.jit
def load_rows(
    base, rows, stride, valid, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, WIDE: gl.constexpr
):  # fmt: skip
    """Rows of one head as `rows_in_memory`; zeros where a row is not valid and beyond head_dim.

    Which rows, and which of them are valid, has the layout `as_rows(BLOCK_D)`.
    """
    return [
        _load_piece(base, rows, stride, valid, piece, HEAD_DIM, BLOCK_D, WIDE) for piece in (0, 1)[: pieces(BLOCK_D)]
    ]


@gluon.jit
def _store_piece(
    base, rows, stride, valid, x, PIECE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr,
    WIDE: gl.constexpr,
):  # fmt: skip
    pointers, column = _pointers(base, rows, stride, PIECE, BLOCK_D, WIDE)
    x = gl.convert_layout(x.to(base.dtype.element_ty), pointers.type.layout)
    valid = gl.convert_layout(valid, gl.SliceLayout(1, pointers.type.layout))
    gl.store(pointers, x, mask=valid[:, None] & (column < HEAD_DIM)[None, :])


@gluon.jit
def store_rows(
    base, rows, stride, valid, x, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, WIDE: gl.constexpr
):  # fmt: skip
    """Write x (64, D) to rows of one head, in their dtype, where a row is valid; layouts as of `load_rows`."""
    for piece in gl.static_range(pieces(BLOCK_D)):
        _store_piece(base, rows, stride, valid, x[piece], piece, HEAD_DIM, BLOCK_D, WIDE)


@gluon.jit
def in_shared(x):
    """Rows as products read them."""
    return [gl.allocate_shared_memory(y.dtype, y.shape, tiles_of(y.shape[1]), y) for y in x]


@gluon.jit
def _tiles(dtype: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr):
    return gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, WIDTH], tiles_of(WIDTH))


@gluon.jit
def room_for_rows(dtype: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr):
    """So many tiles of rows in shared memory."""
    return [_tiles(dtype, STAGES, BLOCK_N, width_of(BLOCK_D, piece)) for piece in (0, 1)[: pieces(BLOCK_D)]]


@gluon.jit
def of_slot(tiles, slot):
    """One of the tiles of `room_for_rows`."""
    return [tile.index(slot) for tile in tiles]


@gluon.jit
def _copy_piece(
    to, base, rows, stride, PIECE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, WIDE: gl.constexpr
):  # fmt: skip
    """Begin to copy rows that all exist to shared memory; zeros beyond head_dim."""
    pointers, column = _pointers(base, rows, stride, PIECE, BLOCK_D, WIDE)
    if HEAD_DIM == BLOCK_D:
        _copy(to, pointers)
    else:
        _copy(to, pointers, mask=(column < HEAD_DIM)[None, :])


@gluon.jit
def make_barriers(SLOTS: gl.constexpr, READY: gl.constexpr, FREE: gl.constexpr):
    """Barriers of slots that say which are ready and which are free, each once so many have arrived."""
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(ready.index(slot), count=READY)
        mbarrier.init(free.index(slot), count=FREE)
    return ready, free


@gluon.jit
def make_ring(
    dtype: gl.constexpr, BESIDES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    PARTS: gl.constexpr,
):  # fmt: skip
    """Tiles of x, of y and of pairs or levels, and barriers: which are ready, and which are free."""
    x_tiles = room_for_rows(dtype, STAGES, BLOCK_N, BLOCK_D)
    y_tiles = room_for_rows(dtype, STAGES, BLOCK_N, BLOCK_D)
    if BESIDES == LEVELS:
        besides = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, LEVEL_COLUMNS], LEVEL_TILES)
    else:
        besides = gl.allocate_shared_memory(gl.int64, [STAGES, BLOCK_N], LINES)
    ready, free = make_barriers(STAGES, _THREADS, PARTS)
    return x_tiles, y_tiles, besides, ready, free


@gluon.jit
def feed_step(
    ring, number, fed, rows, rows_besides, BESIDES: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr,
):  # fmt: skip
    """Copy the columns of a step, with their pairs or levels, as soon as its tiles are free.

    They are given once for each piece, in the layout that it has.
    """
    x_tiles, y_tiles, besides, ready, free = ring
    x_base, stride_x, y_base, stride_y, base_besides = fed
    slot = number % STAGES
    mbarrier.wait(free.index(slot), (number // STAGES) & 1 ^ 1)
    for piece in gl.static_range(pieces(BLOCK_D)):
        _copy_piece(x_tiles[piece].index(slot), x_base, rows[piece], stride_x, piece, HEAD_DIM, BLOCK_D, WIDE)
        _copy_piece(y_tiles[piece].index(slot), y_base, rows[piece], stride_y, piece, HEAD_DIM, BLOCK_D, WIDE)
    if BESIDES == PAIRS:
        _copy(besides.index(slot), base_besides + rows_besides)
    if BESIDES == LEVELS:
        if WIDE:
            rows_besides = rows_besides.to(gl.int64)
        column = gl.arange(0, LEVEL_COLUMNS, gl.SliceLayout(0, LEVELS_IN_MEMORY))
        pointers = gl.multiple_of(base_besides + (rows_besides[:, None] * LEVEL_COLUMNS + column[None, :]), [1, 16])
        _copy(besides.index(slot), pointers)
    async_copy.mbarrier_arrive(ready.index(slot), increment_count=False)


@gluon.jit
def tiles_of_step(ring, number, STAGES: gl.constexpr):
    """The tiles of x, of y and of pairs or levels of a step that this part has waited for and not freed."""
    x_tiles, y_tiles, besides, _ready, _free = ring
    slot = number % STAGES
    return of_slot(x_tiles, slot), of_slot(y_tiles, slot), besides.index(slot)


@gluon.jit
def wait_for_step(ring, number, STAGES: gl.constexpr):
    """Its tiles of x, of y and of pairs or levels, once they are ready."""
    _x_tiles, _y_tiles, _besides, ready, _free = ring
    mbarrier.wait(ready.index(number % STAGES), (number // STAGES) & 1)
    fence_async_shared()
    return tiles_of_step(ring, number, STAGES)


@gluon.jit
def free_step(ring, number, STAGES: gl.constexpr):
    """Of this part: the tiles of a step are needed no longer."""
    _x_tiles, _y_tiles, _besides, _ready, free = ring
    mbarrier.arrive(free.index(number % STAGES))


@gluon.jit
def pass_over(ring, number, STAGES: gl.constexpr):
    """Leave a step to the other part."""
    _x_tiles, _y_tiles, _besides, ready, _free = ring
    mbarrier.wait(ready.index(number % STAGES), (number // STAGES) & 1)
    free_step(ring, number, STAGES)
