"""What a part of a program does with the columns of a step, in Gluon for Hopper: as in `kernels`, `gradient_kernels`.

Letters as in `addressing`; scores and the rest of (64, N) have the layout `product(N)`, sums (64, D) are tuples of
pieces, as all rows are (`hopper_ring`), each with the layout `product` of its width.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .hopper_ring import ROWS, pieces, product, width_of
from .kernels import FIXED_BELOW, partial_sums, reach, squared_norms

_INF = gl.constexpr(float("inf"))


@gluon.jit
def begin_product(a, b, BLOCK_N: gl.constexpr):
    """a·b (64, N) of rows b, under way."""
    none = gl.zeros([ROWS, BLOCK_N], gl.float32, product(BLOCK_N))
    sums = warpgroup_mma(a[0], b[0].permute((1, 0)), none, use_acc=False, is_async=True)
    for piece in gl.static_range(1, len(b)):
        sums = warpgroup_mma(a[piece], b[piece].permute((1, 0)), sums, is_async=True)
    return sums


@gluon.jit
def _zeros(ROWS_OF: gl.constexpr, WIDTH: gl.constexpr):
    return gl.zeros([ROWS_OF, WIDTH], gl.float32, product(WIDTH))


@gluon.jit
def zeros(ROWS_OF: gl.constexpr, BLOCK_D: gl.constexpr):
    """Sums of nothing, of so many rows."""
    return [_zeros(ROWS_OF, width_of(BLOCK_D, piece)) for piece in (0, 1)[: pieces(BLOCK_D)]]


@gluon.constexpr_function
def weights_of(width):
    """Layout of weights (64, N) as an operand of products with rows of that width."""
    return gl.DotOperandLayout(0, product(width_of(width, 0)), 2)


@gluon.jit
def begin_adding(p, x, sums, use_acc=True):
    """Sums (64, D) and p·x of weights p (64, N), under way."""
    return [
        warpgroup_mma(p, x[piece], sums[piece], use_acc=use_acc, is_async=True) for piece in (0, 1)[: len(x)]
    ]  # fmt: skip


@gluon.jit
def have_come(sums):
    """Sums that were under way, as all that is."""
    return (warpgroup_mma_wait(0, deps=sums),) if len(sums) == 1 else warpgroup_mma_wait(0, deps=sums)


@gluon.jit
def both_have_come(first, second):
    """Likewise of two."""
    come = warpgroup_mma_wait(0, deps=first + second)
    return come[: len(first)], come[len(first) :]


@gluon.jit
def as_operand(x, BLOCK_N: gl.constexpr):
    """Rows of a part as an operand, from registers, of products with N columns."""
    operand: gl.constexpr = gl.DotOperandLayout(0, product(BLOCK_N), 2)
    return [gl.convert_layout(piece, operand) for piece in x]


@gluon.jit
def times(x, factor):
    """Rows by a number."""
    return [piece * factor for piece in x]


@gluon.jit
def plus(x, there):
    """Sums and rows, as memory has them."""
    return [
        x[piece] + gl.convert_layout(there[piece].to(gl.float32), x[piece].type.layout) for piece in (0, 1)[: len(x)]
    ]


@gluon.jit
def scores_of(q, k, BLOCK_N: gl.constexpr):
    """q·k (64, N)."""
    return warpgroup_mma_wait(0, deps=[begin_product(q, k, BLOCK_N)])


@gluon.jit
def begin_products(a, b, c, d, BLOCK_N: gl.constexpr):
    """a·b and c·d (64, N), both under way."""
    return begin_product(a, b, BLOCK_N), begin_product(c, d, BLOCK_N)


@gluon.jit
def first_of_products(a, b, c, d, BLOCK_N: gl.constexpr):
    """a·b (64, N), which has come, and c·d, under way."""
    first, second = begin_products(a, b, c, d, BLOCK_N)
    return warpgroup_mma_wait(len(d), deps=[first]), second


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
    row_sum = partial_sums(gl.zeros([ROWS, BLOCK_N], gl.float32, product(BLOCK_N)))
    return zeros(ROWS, BLOCK_D), row_sum, gl.full([ROWS], -_INF, gl.float32, gl.SliceLayout(1, product(BLOCK_N)))


@gluon.jit
def bounded(x, largest, row_max, scale):
    """Whether the scores of rows x have a bound that serves as their maximum, and that or `row_max`: see `kernels`."""
    squares = squared_norms(x[0])
    for piece in gl.static_range(1, len(x)):
        squares += gl.convert_layout(squared_norms(x[piece]), squares.type.layout)
    limit = reach(squares, largest, scale)
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
    return gl.convert_layout(p.to(dtype), weights_of(BLOCK_D)), shrink, row_sum, row_max


@gluon.jit
def shrunk(out, shrink, FIXED: gl.constexpr):
    """Out (64, D) by the factor of `weigh_columns`."""
    if not FIXED:
        out = [x * gl.convert_layout(shrink, gl.SliceLayout(1, x.type.layout))[:, None] for x in out]
    return out


@gluon.jit
def add_columns(p, v, out):
    """Out (64, D) and p·v."""
    return have_come(begin_adding(p, v, out))


@gluon.jit
def attend_columns(
    scores, v, out, row_sum, row_max, scale, bias, full, bound,
    FIXED: gl.constexpr, SPLIT: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """As `kernels.attend_tile`."""
    p, shrink, row_sum, row_max = weigh_columns(
        scores, row_sum, row_max, scale, bias, full, bound, v[0].dtype, FIXED, True, SPLIT, BLOCK_D
    )  # fmt: skip
    return add_columns(p, v, shrunk(out, shrink, FIXED)), row_sum, row_max


@gluon.jit
def finish_attending(out, row_sum, row_max):
    """Out and lse (64,); 0 and -inf of rows without keys."""
    row_sum = gl.convert_layout(gl.sum(row_sum, 1), row_max.type.layout)
    divisor = gl.where(row_sum > 0, row_sum, 1.0)
    out = [x / gl.convert_layout(divisor, gl.SliceLayout(1, x.type.layout))[:, None] for x in out]
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
    ds = gl.convert_layout((p * (dp - delta[:, None])).to(k[0].dtype), weights_of(BLOCK_D))
    return add_columns(ds, k, dq)


@gluon.jit
def _weights_of_columns(
    scores, lse, scale, bias, full, bound, HAS_BOUND: gl.constexpr, SPLIT: gl.constexpr
):  # fmt: skip
    """p (64, N) of scores whose columns are queries with that lse (N,)."""
    p = gl.exp2(scores * scale + (bias - lse)[None, :])
    return where_met(p, 0.0, full, bound, SPLIT) if HAS_BOUND else p


@gluon.jit
def add_to_dv(
    scores, dout, dv, lse, scale, bias, full, bound, HAS_BOUND: gl.constexpr, SPLIT: gl.constexpr, BLOCK_D: gl.constexpr
):  # fmt: skip
    """As `gradient_kernels.key_gradient_tile` dv alone, columns as for `weigh_columns`."""
    p = _weights_of_columns(scores, lse, scale, bias, full, bound, HAS_BOUND, SPLIT)
    return add_columns(gl.convert_layout(p.to(dout[0].dtype), weights_of(BLOCK_D)), dout, dv)


@gluon.jit
def add_to_dk(
    scores, dp, q, dk, lse, delta, scale, bias, full, bound,
    HAS_BOUND: gl.constexpr, SPLIT: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """Likewise dk alone; dp is under way."""
    p = _weights_of_columns(scores, lse, scale, bias, full, bound, HAS_BOUND, SPLIT)
    dp = warpgroup_mma_wait(0, deps=[dp])
    ds = (p * (dp - delta[None, :])).to(q[0].dtype)
    return add_columns(gl.convert_layout(ds, weights_of(BLOCK_D)), q, dk)


@gluon.jit
def add_to_dk_dv(
    scores, dp, q, dout, dk, dv, lse, delta, scale, bias, full, bound,
    HAS_BOUND: gl.constexpr, SPLIT: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """As `gradient_kernels.key_gradient_tile`, columns as for `weigh_columns`; dp comes, dk and dv go under way."""
    OPERAND: gl.constexpr = weights_of(BLOCK_D)
    p = _weights_of_columns(scores, lse, scale, bias, full, bound, HAS_BOUND, SPLIT)
    dv = begin_adding(gl.convert_layout(p.to(q[0].dtype), OPERAND), dout, dv)
    dp = warpgroup_mma_wait(len(dv), deps=[dp])
    ds = (p * (dp - delta[None, :])).to(q[0].dtype)
    return begin_adding(gl.convert_layout(ds, OPERAND), q, dk), dv
