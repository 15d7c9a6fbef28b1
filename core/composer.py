"""Computes a schedule of dense pieces with any dense kernel, forward and backward, on strided views.

Shapes: B batch, S query length, T key length, H query heads, K key-value heads, D head_dim. Tensors are (B, S, H, D) or
(B, T, K, D); lse is (B, H, S).

Forward merges the pieces of a row by log-sum-exp: out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i).
Backward hands each piece the *merged* out and lse, which makes the kernel's own formula the exact gradient of the joint
softmax: p = exp(s - lse), ds = p * (dout·v - sum(dout * out)). Low-precision results are accumulated in float32.

In memory lse is (B, S, H), so that segments of lse stack over the batch exactly where those of the other tensors do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from .kernel import WIDENING, DenseKernel, DensePiece
from .schedule import Call, Rows, Schedule
from .tracing import span


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else: the dtype of lse and of sums over pieces."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: Tensor, lse: Tensor, out_piece: Tensor, lse_piece: Tensor) -> None:
    """Merge a piece into `out` (B, S, H, D) and `lse` (B, H, S) in place; both may be strided views.

    `lse` may be -inf (nothing merged yet, `out` is 0 there); so may `lse_piece` (a row without keys). Where `out` is
    of half precision, it is rounded once more.
    """
    share = torch.sigmoid(lse_piece - lse)
    share.nan_to_num_(nan=0.0)  # -inf against -inf: the piece has no share
    out.lerp_(out_piece.to(out.dtype), share.transpose(1, 2).unsqueeze(-1).to(out.dtype))
    lse.copy_(torch.logaddexp(lse, lse_piece))


def by_rows(lse: Tensor) -> Tensor:
    """lse (B, H, S) with (B, S, H) in memory, like the rows of out, so that strided views of rows serve both."""
    return lse.transpose(1, 2).contiguous().transpose(1, 2)


def delta_of(dout: Tensor, dlse: Tensor | None, out: Tensor) -> Tensor:
    """sum(dout * out) - dlse, (B, H, S) in the accumulator's dtype: what backward takes off each row's dout·v."""
    delta = (dout * out).sum(dim=-1, dtype=accumulator_dtype(out.dtype)).transpose(1, 2)
    return delta if dlse is None else delta - dlse


def widen_rows(dout: Tensor, dlse: Tensor, query: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`WIDENING` more columns that make a kernel's delta, sum(dout * out), into delta - dlse.

    Keys and values get as many columns of zeros; gradients then have them too. Returns dout, query and out.
    """
    dout, query, out = (functional.pad(x, (0, WIDENING)) for x in (dout, query, out))
    dout[..., -WIDENING] = dlse.transpose(1, 2)
    out[..., -WIDENING] = -1.0
    return dout, query, out


@attrs.frozen
class _Slab:
    """The part of a call that one kernel launch takes: a stack of segments, or one segment of every batch row."""

    batch: int
    segment: int
    size: int
    along_batch: bool

    def view(self, x: Tensor, rows: Rows) -> Tensor:
        """`rows` of x (B, S, H, D) as (size, count, num_heads, D)."""
        s_batch, s_row, s_head, _ = x.stride()
        step = s_batch if self.along_batch else rows.segment_step * s_row
        start = self._start(rows, s_batch, s_row, s_head)
        return x.as_strided(
            (self.size, rows.count, rows.num_heads, x.shape[3]),
            (step, rows.step * s_row, rows.head_step * s_head + rows.head_shift * s_row, 1),
            x.storage_offset() + start,
        )

    def view_lse(self, lse: Tensor, rows: Rows) -> Tensor:
        """`rows` of lse (B, H, S) as (size, num_heads, count)."""
        s_batch, s_head, s_row = lse.stride()
        step = s_batch if self.along_batch else rows.segment_step * s_row
        start = self._start(rows, s_batch, s_row, s_head)
        return lse.as_strided(
            (self.size, rows.num_heads, rows.count),
            (step, rows.head_step * s_head + rows.head_shift * s_row, rows.step * s_row),
            lse.storage_offset() + start,
        )

    def _start(self, rows: Rows, s_batch: int, s_row: int, s_head: int) -> int:
        row = rows.start + self.segment * rows.segment_step
        return self.batch * s_batch + row * s_row + rows.head * s_head


def slabs_of(call: Call, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> list[_Slab]:
    """Cover a call with as few launches as the tensors' strides allow."""
    batch = queries[0].shape[0]
    if call.segments == 1:
        return [_Slab(0, 0, batch, along_batch=True)]
    if batch == 1 or all(
        call.segments * rows.segment_step == x.shape[1] and x.stride(0) == x.shape[1] * x.stride(1)
        for xs, rows in ((queries, call.query), (keys, call.key))
        for x in xs
    ):
        return [_Slab(0, 0, batch * call.segments, along_batch=False)]
    if call.segments < batch:
        return [_Slab(0, segment, batch, along_batch=True) for segment in range(call.segments)]
    return [_Slab(row, 0, call.segments, along_batch=False) for row in range(batch)]


def _is_stack(rows: Rows, segments: int, x: Tensor) -> bool:
    """True where the stacked segments are exactly the rows and heads of x, in their order."""
    return (
        rows.step == 1
        and rows.head_step == 1
        and rows.head_shift == 0
        and segments * rows.count == x.shape[1]
        and rows.num_heads == x.shape[2]
    )


def _adoptable(schedule: Schedule, query: Tensor, key: Tensor, slabs: list[_Slab]) -> bool:
    """True where the first call covers everything in one launch: its results, reshaped, are then the first sums.

    `slabs` are those of that call, none where it does not cover everything.
    """
    if len(slabs) != 1:
        return False
    call = schedule.calls[0]
    return _is_stack(call.query, call.segments, query) and _is_stack(call.key, call.segments, key)


def _stacks_by_rows(lse: Tensor, calls: Sequence[Call]) -> bool:
    """Whether views of lse (B, H, S) stack where those of rows do: it lies by rows, or none stacks over the batch."""
    batch, heads, _ = lse.shape
    return batch == 1 or heads == 1 or lse.stride(1) == 1 or all(call.segments == 1 for call in calls)


@attrs.frozen(eq=False)
class RowsOfQueries:
    """A gradient of those queries that a call takes."""

    _slab: _Slab
    _rows: Rows
    _grad: Tensor

    def add_to(self, total: Tensor) -> None:
        """Add it to the gradient of all queries (B, S, H, D); columns beyond D are left out."""
        self._slab.view(total, self._rows).add_(self._grad[..., : total.shape[3]])


@attrs.frozen
class _OfNegatedQueries:
    """A kernel for the negated queries: what it computes with a scale, `kernel` computes with the opposite one."""

    kernel: DenseKernel

    @property
    def name(self) -> str:
        return self.kernel.name

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        return self.kernel.forward(-query, key, value, piece)

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = self.kernel.backward(dout, -query, key, value, out, lse, piece)
        return -dq, dk, dv


@attrs.frozen(eq=False)
class Composer:
    """A dense kernel made to compute schedules.

    Attributes:
        kernel: computes one dense piece.
        scale: factor on q·k. The kernel only sees positive ones: flash kernels that mask and take maxima before they
            scale (aten's for CPUs among them) turn masked scores into +inf with a negative one.
        deterministic: passed on to the kernel.
    """

    kernel: DenseKernel
    scale: float
    deterministic: bool
    _pieces: tuple[DensePiece, DensePiece] = attrs.field(init=False)
    _kernel: DenseKernel = attrs.field(init=False)

    @_pieces.default
    def _make_pieces(self) -> tuple[DensePiece, DensePiece]:
        full = DensePiece(is_causal=False, scale=abs(self.scale), deterministic=self.deterministic)
        return full, attrs.evolve(full, is_causal=True)

    @_kernel.default
    def _make_kernel(self) -> DenseKernel:
        return self.kernel if self.scale > 0 else _OfNegatedQueries(self.kernel)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Return out (B, S, H, D), in the accumulator's dtype where pieces were merged, and lse (B, H, S).

        Rows that no call touches have out 0 and lse -inf.
        """
        calls = schedule.calls
        if schedule.is_whole:
            return self._kernel.forward(query, key, value, self._pieces[calls[0].is_causal])
        batch, length, heads, _ = query.shape
        dtype = accumulator_dtype(query.dtype)
        start = 0
        slabs = slabs_of(calls[0], (query,), (key, value)) if schedule.cover == 1 else []
        if _adoptable(schedule, query, key, slabs):
            start = 1
            with span(calls[0].name):
                first, first_lse = self._forward(calls[0], slabs[0], query, key, value)
            out = first.reshape(query.shape).contiguous()  # whatever strides the kernel's results have
            lse = first_lse.transpose(1, 2).reshape(batch, length, heads).contiguous().transpose(1, 2)
            if len(calls) == 1:
                return out, lse
            out = out.to(dtype)
        else:
            out = (torch.empty if schedule.cover else torch.zeros)(query.shape, dtype=dtype, device=query.device)
            lse = torch.full((batch, length, heads), -math.inf, dtype=dtype, device=query.device).transpose(1, 2)
        self.merge_into(out, lse, query, key, value, calls[start:], written=schedule.cover - start)
        return out, lse

    def merge_into(
        self,
        out: Tensor,
        lse: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        calls: Sequence[Call],
        *,
        written: int = 0,
    ) -> None:
        """Merge calls into `out` (B, S, H, D) and `lse` (B, H, S) of the accumulator's dtype, in place.

        `out` is contiguous; `lse` is (B, S, H) in memory where calls stack segments and batch rows. The results of the
        first `written` calls replace what is there.
        """
        assert _stacks_by_rows(lse, calls)
        for index, call in enumerate(calls):
            with span(call.name):
                for slab in slabs_of(call, (query,), (key, value)):
                    part, part_lse = self._forward(call, slab, query, key, value)
                    into, into_lse = slab.view(out, call.query), slab.view_lse(lse, call.query)
                    if index < written:
                        into.copy_(part)
                        into_lse.copy_(part_lse)
                    else:
                        merge_(into, into_lse, part, part_lse)

    def _forward(self, call: Call, slab: _Slab, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        views = slab.view(query, call.query), slab.view(key, call.key), slab.view(value, call.key)
        out, lse = self._kernel.forward(*views, self._pieces[call.is_causal])
        return out, lse + math.log(call.weight) if call.weight > 1 else lse  # a pair counted twice only has more share

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, schedule: Schedule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the calls, given the merged out and the merged lse (+inf in rows without keys)."""
        calls = schedule.calls
        if schedule.is_whole:
            return self._kernel.backward(dout, query, key, value, out, lse, self._pieces[calls[0].is_causal])
        inputs = (query, key, value)
        dtype = accumulator_dtype(query.dtype)
        lse = by_rows(lse)
        start = 0
        slabs = slabs_of(calls[0], (query, dout, out), (key, value)) if schedule.cover == 1 else []
        if _adoptable(schedule, query, key, slabs):
            start = 1
            with span(calls[0].name):
                grads = self._backward(calls[0], slabs[0], dout, query, key, value, out, lse)
            totals = [grad.reshape(x.shape).contiguous() for grad, x in zip(grads, inputs, strict=True)]
            if len(calls) > 1:
                totals = [total.to(dtype) for total in totals]
        else:
            fill = torch.empty if schedule.cover else torch.zeros
            totals = [fill(x.shape, dtype=dtype, device=x.device) for x in inputs]
        dq, dk, dv = totals
        sums = (dq, dk, dv)
        self.backward_into(sums, dout, query, key, value, out, lse, calls[start:], written=schedule.cover - start)
        return sums

    def backward_into(
        self,
        totals: tuple[Tensor, Tensor, Tensor],
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        calls: Sequence[Call],
        *,
        written: int = 0,
    ) -> None:
        """Add the gradients of calls to `totals`, shaped like query, key and value and contiguous, in place.

        Those of the first `written` calls replace what is there.
        """
        lse = by_rows(lse)
        for index, call in enumerate(calls):
            with span(call.name):
                for slab in slabs_of(call, (query, dout, out), (key, value)):
                    grads = self._backward(call, slab, dout, query, key, value, out, lse)
                    for total, grad, rows in zip(totals, grads, (call.query, call.key, call.key), strict=True):
                        into = slab.view(total, rows)
                        if index < written:
                            into.copy_(grad)
                        else:
                            into.add_(grad)

    def backward_of_keys(
        self,
        totals: tuple[Tensor, Tensor],
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        calls: Sequence[Call],
    ) -> list[RowsOfQueries]:
        """Add the gradients of keys and values to `totals` as `backward_into` does, and return those of queries.

        `lse` is (B, S, H) in memory where calls stack segments and batch rows.
        """
        assert _stacks_by_rows(lse, calls)
        found = []
        for call in calls:
            with span(call.name):
                for slab in slabs_of(call, (query, dout, out), (key, value)):
                    dq, *grads = self._backward(call, slab, dout, query, key, value, out, lse)
                    for total, grad in zip(totals, grads, strict=True):
                        slab.view(total, call.key).add_(grad)
                    found.append(RowsOfQueries(slab, call.query, dq))
        return found

    def _backward(
        self, call: Call, slab: _Slab, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        lse_view = slab.view_lse(lse, call.query)
        return self._kernel.backward(
            slab.view(dout, call.query),
            slab.view(query, call.query),
            slab.view(key, call.key),
            slab.view(value, call.key),
            slab.view(out, call.query),
            lse_view - math.log(call.weight) if call.weight > 1 else lse_view,
            self._pieces[call.is_causal],
        )
