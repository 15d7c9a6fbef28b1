"""The backward pass over branches in Gluon, Triton's lower dialect, for Hopper: products overlap by hand.

The same sums in the same order as `gradient_kernels`. There each product is waited for before the next one is issued;
here a step issues those of scores and of dout·v together, leaves the last ones under way, and a ring of tiles in shared
memory is filled ahead. ptxas gives the overlap up ("serialized") where a sum that is under way when a step begins may
also come from elsewhere than the step before: hence the early return of tiles without columns.

Letters as in `addressing`. The columns of a step are rows (N, D) of two tensors, x and y: keys and values, or queries
and dout.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .addressing import AS_THEY_ARE, next_run, place_of_runs, tile_and_head
from .gradient_kernels import unpack

_TILES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_LINES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.constexpr_function
def _product(warps, columns):
    """Layout of a product of M rows, 16 of them a warp, by so many columns."""
    return gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, columns, 16])


@gluon.constexpr_function
def _rows_in_memory(warps, width):
    """Layout of rows of that width as memory is read and written, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [warps, 1], [1, 0])


@gluon.jit
def _rows(
    kind, tile, slot_group, slot_index, group_size, group_start, residues, low, high, origin, period, groups,
    BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """As `addressing.tile_of_rows`, in that layout."""
    slot = kind * period + tile % period
    table = kind * groups + gl.load(slot_group + slot)
    size = gl.load(group_size + table)
    start = gl.load(group_start + table)
    element = gl.load(slot_index + slot) * BLOCK_M + gl.arange(0, BLOCK_M, LAYOUT)
    residue = gl.load(residues + kind * period + start + element % size)
    position = origin + (tile // period) * BLOCK_M * period + (element // size) * period + residue
    return table, position, (position >= low) & (position < high)


@gluon.jit
def _pointers(base, rows, stride, BLOCK_D: gl.constexpr, WIDE: gl.constexpr, LAYOUT: gl.constexpr):
    column = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LAYOUT))
    if WIDE:
        rows = rows.to(gl.int64)
    return base + (rows[:, None] * stride + column[None, :]), column


@gluon.jit
def _rows_in_shared(
    base, rows, stride, valid, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, WIDE: gl.constexpr, LAYOUT: gl.constexpr
):
    """Rows (M, D) of one head in shared memory; zeros where a row is not valid and beyond head_dim."""
    pointers, column = _pointers(base, rows, stride, BLOCK_D, WIDE, LAYOUT)
    x = gl.load(pointers, mask=valid[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    return gl.allocate_shared_memory(base.dtype.element_ty, x.shape, _TILES, x)


@gluon.jit
def _store_rows(
    base, rows, stride, valid, x, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, WIDE: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Write x (M, D) to rows of one head, in their dtype, where a row is valid."""
    pointers, column = _pointers(base, rows, stride, BLOCK_D, WIDE, LAYOUT)
    x = gl.convert_layout(x.to(base.dtype.element_ty), LAYOUT)
    gl.store(pointers, x, mask=valid[:, None] & (column < HEAD_DIM)[None, :])


@gluon.jit
def _copy_rows(
    to, base, rows, stride, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, WIDE: gl.constexpr, LAYOUT: gl.constexpr
):
    """Begin to copy rows (N, D) that all exist to shared memory; zeros beyond head_dim."""
    pointers, column = _pointers(base, rows, stride, BLOCK_D, WIDE, LAYOUT)
    if HEAD_DIM == BLOCK_D:
        async_copy.async_copy_global_to_shared(to, pointers)
    else:
        async_copy.async_copy_global_to_shared(to, pointers, mask=(column < HEAD_DIM)[None, :])


@gluon.jit
def _fill(
    x_tile, y_tile, x_base, y_base, stride_x, stride_y, runs, begin, step, left, walks, biases, position, valid, low,
    high, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, WIDE: gl.constexpr,
    SHIFTS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Begin to copy the columns of the next step, of the next run where none of this one is left.

    Returns where that leaves off: runs, begin, step and left.
    """
    if left <= 0:
        begin, step, left, _full, _bound, _bias = next_run(runs, walks, biases, position, valid, low, high, SHIFTS)
        runs += 4
    columns = begin + gl.minimum(gl.arange(0, BLOCK_N, gl.SliceLayout(1, LAYOUT)), left - 1) * step
    _copy_rows(x_tile, x_base, columns, stride_x, HEAD_DIM, BLOCK_D, WIDE, LAYOUT)
    _copy_rows(y_tile, y_base, columns, stride_y, HEAD_DIM, BLOCK_D, WIDE, LAYOUT)
    return runs, begin + BLOCK_N * step, step, left - BLOCK_N


@gluon.jit
def _copy_stats(to, base, begin, step, left, BLOCK_N: gl.constexpr):
    """Begin to copy the pairs of the queries that `_fill` has just begun to copy, by where it left off."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    index = gl.minimum(gl.arange(0, BLOCK_N, LAYOUT), left + BLOCK_N - 1)
    async_copy.async_copy_global_to_shared(to, base + begin + (index - BLOCK_N) * step)


@gluon.jit(do_not_specialize=AS_THEY_ARE)
def gradients_of_queries(
    q_ptr, k_ptr, v_ptr, dout_ptr, stats_ptr, dq_ptr,
    head_kind, slot_group, slot_index, group_size, group_start, residues, walks, biases, run_start, runs, totals,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    q_low, q_high, k_low, k_high, origin, scale, grad_scale, num_heads, group_heads,
    period, groups, most_walks, blocks, block_runs,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, SPLIT: gl.constexpr, SHIFTS: gl.constexpr,
):  # fmt: skip
    """As `gradient_kernels.gradients_of_queries`."""
    SCORES: gl.constexpr = _product(gl.num_warps(), BLOCK_N)
    SUMS: gl.constexpr = _product(gl.num_warps(), BLOCK_D)
    MEMORY: gl.constexpr = _rows_in_memory(gl.num_warps(), BLOCK_D)
    AHEAD: gl.constexpr = STAGES - 2  # the tile before the last one may still be read
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    tile, head = tile_and_head(num_heads)
    batch, kind = gl.program_id(1).to(gl.int64), gl.load(head_kind + head)
    table, position, valid = _rows(
        kind, tile, slot_group, slot_index, group_size, group_start, residues, q_low, q_high, origin, period, groups,
        BLOCK_M, gl.SliceLayout(1, SCORES),
    )  # fmt: skip
    table, row, exists = _rows(
        kind, tile, slot_group, slot_index, group_size, group_start, residues, q_low, q_high, origin, period, groups,
        BLOCK_M, gl.SliceLayout(1, MEMORY),
    )  # fmt: skip
    row -= q_low
    dq_base = dq_ptr + batch * stride_ob + head.to(gl.int64) * stride_oh
    place, total_place = place_of_runs(kind, tile, run_start, blocks, period, block_runs)
    total = gl.load(totals + total_place)
    if total <= 0:
        zeros = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, MEMORY)
        _store_rows(dq_base, row, stride_os, exists, zeros, HEAD_DIM, BLOCK_D, WIDE, MEMORY)
        return
    runs += place
    walks += table * most_walks * 9
    biases += table * most_walks
    q_base = q_ptr + batch * stride_qb + head.to(gl.int64) * stride_qh
    g_base = dout_ptr + batch * stride_gb + head.to(gl.int64) * stride_gh
    k_base = k_ptr + batch * stride_kb + (head // group_heads).to(gl.int64) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // group_heads).to(gl.int64) * stride_vh
    q = _rows_in_shared(q_base, row, stride_qs, exists, HEAD_DIM, BLOCK_D, WIDE, MEMORY)
    dout = _rows_in_shared(g_base, row, stride_gs, exists, HEAD_DIM, BLOCK_D, WIDE, MEMORY)
    fence_async_shared()
    stats_base = stats_ptr + (batch * num_heads + head) * (q_high - q_low)
    lse, delta = unpack(gl.load(stats_base + position - q_low, mask=valid, other=0))
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], _TILES)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], _TILES)
    none = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)
    dq = warpgroup_mma_init(gl.zeros([BLOCK_M, BLOCK_D], gl.float32, SUMS))
    bound = gl.zeros([BLOCK_M], gl.int32, gl.SliceLayout(1, SCORES))
    offset = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    ahead, begin, step, to_load = runs, 0, 0, 0
    left, full, bias = 0, 0, 0.0
    for number in gl.static_range(AHEAD):
        if number < total:
            ahead, begin, step, to_load = _fill(
                k_tiles.index(number), v_tiles.index(number), k_base, v_base, stride_ks, stride_vs,
                ahead, begin, step, to_load, walks, biases, position, valid, k_low, k_high,
                HEAD_DIM, BLOCK_D, BLOCK_N, WIDE, SHIFTS, MEMORY,
            )  # fmt: skip
        async_copy.commit_group()
    for number in range(total):
        if number + AHEAD < total:
            slot = (number + AHEAD) % STAGES
            ahead, begin, step, to_load = _fill(
                k_tiles.index(slot), v_tiles.index(slot), k_base, v_base, stride_ks, stride_vs,
                ahead, begin, step, to_load, walks, biases, position, valid, k_low, k_high,
                HEAD_DIM, BLOCK_D, BLOCK_N, WIDE, SHIFTS, MEMORY,
            )  # fmt: skip
        async_copy.commit_group()
        if left <= 0:
            _begin, _step, left, full, bound, bias = next_run(
                runs, walks, biases, position, valid, k_low, k_high, SHIFTS
            )  # fmt: skip
            runs += 4
        async_copy.wait_group(AHEAD)
        k, v = k_tiles.index(number % STAGES), v_tiles.index(number % STAGES)
        scores = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
        dp = warpgroup_mma(dout, v.permute((1, 0)), none, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        p = gl.exp2(scores * scale + (bias - lse)[:, None])
        if full < BLOCK_N if SPLIT else True:
            p = gl.where(offset[None, :] < bound[:, None], p, 0.0)
        dp = warpgroup_mma_wait(0, deps=[dp])
        ds = gl.convert_layout((p * (dp - delta[:, None])).to(dtype), gl.DotOperandLayout(0, SUMS, 2))
        dq = warpgroup_mma(ds, k, dq, is_async=True)
        left -= BLOCK_N
        full -= BLOCK_N
        bound -= BLOCK_N
    dq = warpgroup_mma_wait(0, deps=[dq])
    _store_rows(dq_base, row, stride_os, exists, dq * grad_scale, HEAD_DIM, BLOCK_D, WIDE, MEMORY)


@gluon.jit(do_not_specialize=AS_THEY_ARE)
def gradients_of_keys(
    q_ptr, k_ptr, v_ptr, dout_ptr, stats_ptr, dk_ptr, dv_ptr,
    head_kind, slot_group, slot_index, group_size, group_start, residues, walks, biases, run_start, runs, totals,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_gb, stride_gs, stride_gh, stride_ob, stride_os, stride_oh,
    q_low, q_high, k_low, k_high, origin, scale, grad_scale, num_heads, group_heads,
    period, groups, most_walks, blocks, block_runs,
    HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, SPLIT: gl.constexpr, SHIFTS: gl.constexpr,
):  # fmt: skip
    """As `gradient_kernels.gradients_of_keys`."""
    SCORES: gl.constexpr = _product(gl.num_warps(), BLOCK_N)
    SUMS: gl.constexpr = _product(gl.num_warps(), BLOCK_D)
    MEMORY: gl.constexpr = _rows_in_memory(gl.num_warps(), BLOCK_D)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    AHEAD: gl.constexpr = STAGES - 2  # the tile before the last one may still be read
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    tile, head = tile_and_head(num_heads)
    batch, kind = gl.program_id(1).to(gl.int64), gl.load(head_kind + head)
    table, position, valid = _rows(
        kind, tile, slot_group, slot_index, group_size, group_start, residues, k_low, k_high, origin, period, groups,
        BLOCK_M, gl.SliceLayout(1, SCORES),
    )  # fmt: skip
    table, row, exists = _rows(
        kind, tile, slot_group, slot_index, group_size, group_start, residues, k_low, k_high, origin, period, groups,
        BLOCK_M, gl.SliceLayout(1, MEMORY),
    )  # fmt: skip
    row -= k_low
    place_out = batch * stride_ob + head.to(gl.int64) * stride_oh
    place, total_place = place_of_runs(kind, tile, run_start, blocks, period, block_runs)
    total = gl.load(totals + total_place)
    if total <= 0:
        zeros = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, MEMORY)
        _store_rows(dk_ptr + place_out, row, stride_os, exists, zeros, HEAD_DIM, BLOCK_D, WIDE, MEMORY)
        _store_rows(dv_ptr + place_out, row, stride_os, exists, zeros, HEAD_DIM, BLOCK_D, WIDE, MEMORY)
        return
    runs += place
    walks += table * most_walks * 9
    biases += table * most_walks
    q_base = q_ptr + batch * stride_qb + head.to(gl.int64) * stride_qh
    g_base = dout_ptr + batch * stride_gb + head.to(gl.int64) * stride_gh
    k_base = k_ptr + batch * stride_kb + (head // group_heads).to(gl.int64) * stride_kh
    v_base = v_ptr + batch * stride_vb + (head // group_heads).to(gl.int64) * stride_vh
    k = _rows_in_shared(k_base, row, stride_ks, exists, HEAD_DIM, BLOCK_D, WIDE, MEMORY)
    v = _rows_in_shared(v_base, row, stride_vs, exists, HEAD_DIM, BLOCK_D, WIDE, MEMORY)
    fence_async_shared()
    stats_base = stats_ptr + (batch * num_heads + head) * (q_high - q_low)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], _TILES)
    g_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], _TILES)
    stats = gl.allocate_shared_memory(gl.int64, [STAGES, BLOCK_N], _LINES)
    none = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES)
    dk = warpgroup_mma_init(gl.zeros([BLOCK_M, BLOCK_D], gl.float32, SUMS))
    dv = warpgroup_mma_init(gl.zeros([BLOCK_M, BLOCK_D], gl.float32, SUMS))
    bound = gl.zeros([BLOCK_M], gl.int32, gl.SliceLayout(1, SCORES))
    offset = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    ahead, begin, step, to_load = runs, 0, 0, 0
    left, full, bias = 0, 0, 0.0
    for number in gl.static_range(AHEAD):
        if number < total:
            ahead, begin, step, to_load = _fill(
                q_tiles.index(number), g_tiles.index(number), q_base, g_base, stride_qs, stride_gs,
                ahead, begin, step, to_load, walks, biases, position, valid, q_low, q_high,
                HEAD_DIM, BLOCK_D, BLOCK_N, WIDE, SHIFTS, MEMORY,
            )  # fmt: skip
            _copy_stats(stats.index(number), stats_base, begin, step, to_load, BLOCK_N)
        async_copy.commit_group()
    for number in range(total):
        if number + AHEAD < total:
            slot = (number + AHEAD) % STAGES
            ahead, begin, step, to_load = _fill(
                q_tiles.index(slot), g_tiles.index(slot), q_base, g_base, stride_qs, stride_gs,
                ahead, begin, step, to_load, walks, biases, position, valid, q_low, q_high,
                HEAD_DIM, BLOCK_D, BLOCK_N, WIDE, SHIFTS, MEMORY,
            )  # fmt: skip
            _copy_stats(stats.index(slot), stats_base, begin, step, to_load, BLOCK_N)
        async_copy.commit_group()
        if left <= 0:
            _begin, _step, left, full, bound, bias = next_run(
                runs, walks, biases, position, valid, q_low, q_high, SHIFTS
            )  # fmt: skip
            runs += 4
        async_copy.wait_group(AHEAD)
        q, dout = q_tiles.index(number % STAGES), g_tiles.index(number % STAGES)
        scores = warpgroup_mma(k, q.permute((1, 0)), none, use_acc=False, is_async=True)
        dp = warpgroup_mma(v, dout.permute((1, 0)), none, use_acc=False, is_async=True)
        lse, delta = unpack(stats.index(number % STAGES).load(gl.SliceLayout(0, SCORES)))
        scores = warpgroup_mma_wait(1, deps=[scores])
        p = gl.exp2(scores * scale + (bias - lse)[None, :])
        if full < BLOCK_N if SPLIT else True:
            p = gl.where(offset[None, :] < bound[:, None], p, 0.0)
        dv = warpgroup_mma(gl.convert_layout(p.to(dtype), OPERAND), dout, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = (p * (dp - delta[None, :])).to(dtype)
        dk = warpgroup_mma(gl.convert_layout(ds, OPERAND), q, dk, is_async=True)
        left -= BLOCK_N
        full -= BLOCK_N
        bound -= BLOCK_N
    dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    _store_rows(dk_ptr + place_out, row, stride_os, exists, dk * grad_scale, HEAD_DIM, BLOCK_D, WIDE, MEMORY)
    _store_rows(dv_ptr + place_out, row, stride_os, exists, dv, HEAD_DIM, BLOCK_D, WIDE, MEMORY)
