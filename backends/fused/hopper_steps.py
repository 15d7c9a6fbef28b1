"""What a part of a program does with the columns of a step, in Gluon for Hopper: as in `kernels`, `gradient_kernels`.

Letters as in `addressing`; scores and the rest of (64, N) have the layout `product(N)`, sums that of `product(D)`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .hopper_ring import ROWS, product
from .kernels import FIXED_BELOW, partial_sums, reach

_INF = gl.constexpr(float("inf"))


@gluon.jit
def begin_product(a, b, BLOCK_N: gl.constexpr):
    """a·b (64, N) of rows b, under way."""
    none = gl.zeros([ROWS, BLOCK_N], gl.float32, product(BLOCK_N))
    return warpgroup_mma(a, b.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def scores_of(q, k, BLOCK_N: gl.constexpr):
    """q·k (64, N)."""
    return warpgroup_mma_wait(0, deps=[begin_product(q, k, BLOCK_N)])


@gluon.jit
def begin_products(a, b, c, d, BLOCK_N: gl.constexpr):
    """a·b and c·d (64, N), both under way."""
    return begin_product(a, b, BLOCK_N), begin_product(c, d, BLOCK_N)


@gluon.jit
def where_met(x, otherwise: gl.constexpr, full, bound, SPLIT: gl.constexpr):
    """x (64, N) where a row meets a column: those below its bound (64,), which are all if N is no more than `full`."""
    if full < x.shape[1] if SPLIT else True:
        offset = gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
        x = gl.where(offset[None, :] < bound[:, None], x, otherwise)
    return x


@gluon.jit
def no_sums(BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr):
    """Out, row_sum and row_max of no columns."""
    out = gl.zeros([ROWS, BLOCK_D], gl.float32, product(BLOCK_D))
    row_sum = partial_sums(gl.zeros([ROWS, BLOCK_N], gl.float32, product(BLOCK_N)))
    return out, row_sum, gl.full([ROWS], -_INF, gl.float32, gl.SliceLayout(1, product(BLOCK_N)))


@gluon.jit
def bounded(x, largest, row_max, scale):
    """Whether the scores of rows x have a bound that serves as their maximum, and that or `row_max`: see `kernels`."""
    limit = reach(x, largest, scale)
    is_bounded = gl.max(limit, 0) < FIXED_BELOW
    return is_bounded, gl.where(is_bounded, gl.convert_layout(limit, row_max.type.layout), row_max)


@gluon.jit
def weigh_columns(
    scores, row_sum, row_max, scale, bias, full, bound, dtype: gl.constexpr,
    FIXED: gl.constexpr, HAS_BOUND: gl.constexpr, SPLIT: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """p (64, N) of `kernels.attend_tile` as an operand, the factor of earlier sums (64,), row_sum and row_max.

    Without HAS_BOUND a row meets all columns whose scores are not -inf. The factor is for `shrunk`, which knows that
    where FIXED there is none.
    """
    if FIXED:
        p = gl.exp2(scores * scale + (bias - row_max)[:, None])
        if HAS_BOUND:
            p = where_met(p, 0.0, full, bound, SPLIT)
        shrink = row_max
        row_sum += partial_sums(p)
    else:
        if HAS_BOUND:
            scores = where_met(scores, -_INF, full, bound, SPLIT)
        new_max = gl.maximum(row_max, gl.max(scores, 1) * scale + bias)
        shift = gl.where(new_max == -_INF, 0.0, new_max)
        p = gl.exp2(scores * scale + (bias - shift)[:, None])
        shrink = gl.exp2(row_max - shift)
        of_sums = gl.convert_layout(shrink, gl.SliceLayout(1, row_sum.type.layout))
        row_sum = row_sum * of_sums[:, None] + partial_sums(p)
        row_max = new_max
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, product(BLOCK_D), 2)), shrink, row_sum, row_max


@gluon.jit
def shrunk(out, shrink, FIXED: gl.constexpr):
    """Out (64, D) by the factor of `weigh_columns`."""
    if not FIXED:
        out = out * gl.convert_layout(shrink, gl.SliceLayout(1, out.type.layout))[:, None]
    return out


@gluon.jit
def add_columns(p, v, out):
    """Out (64, D) and p·v."""
    return warpgroup_mma_wait(0, deps=[warpgroup_mma(p, v, out, is_async=True)])


@gluon.jit
def attend_columns(
    scores, v, out, row_sum, row_max, scale, bias, full, bound,
    FIXED: gl.constexpr, SPLIT: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """As `kernels.attend_tile`."""
    p, shrink, row_sum, row_max = weigh_columns(
        scores, row_sum, row_max, scale, bias, full, bound, v.dtype, FIXED, True, SPLIT, BLOCK_D
    )  # fmt: skip
    return add_columns(p, v, shrunk(out, shrink, FIXED)), row_sum, row_max


@gluon.jit
def finish_attending(out, row_sum, row_max, BLOCK_D: gl.constexpr):
    """Out and lse (64,); 0 and -inf of rows without keys."""
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), row_max.type.layout)
    divisor = gl.where(row_sum > 0, row_sum, 1.0)
    out = out / gl.convert_layout(divisor, gl.SliceLayout(1, product(BLOCK_D)))[:, None]
    return out, gl.where(row_sum > 0, row_max + gl.log2(divisor), -_INF) * 0.6931471805599453


@gluon.jit
def add_to_dq(
    scores, dp, k, dq, lse, delta, scale, bias, full, bound,
    HAS_BOUND: gl.constexpr, SPLIT: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """As `gradient_kernels.query_gradient_tile`; columns as for `weigh_columns`, and dp under way."""
    p = gl.exp2(scores * scale + (bias - lse)[:, None])
    if HAS_BOUND:
        p = where_met(p, 0.0, full, bound, SPLIT)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = gl.convert_layout((p * (dp - delta[:, None])).to(k.dtype), gl.DotOperandLayout(0, product(BLOCK_D), 2))
    dq = warpgroup_mma(ds, k, dq, is_async=True)
    return warpgroup_mma_wait(0, deps=[dq])


@gluon.jit
def add_to_dk_dv(
    scores, dp, q, dout, dk, dv, lse, delta, scale, bias, full, bound,
    HAS_BOUND: gl.constexpr, SPLIT: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """As `gradient_kernels.key_gradient_tile`, columns as for `weigh_columns`; dp comes, dk and dv go under way."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, product(BLOCK_D), 2)
    p = gl.exp2(scores * scale + (bias - lse)[None, :])
    if HAS_BOUND:
        p = where_met(p, 0.0, full, bound, SPLIT)
    dv = warpgroup_mma(gl.convert_layout(p.to(q.dtype), OPERAND), dout, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    return warpgroup_mma(gl.convert_layout(ds, OPERAND), q, dk, is_async=True), dv
