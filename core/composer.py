"""Computes a schedule of dense pieces with any dense kernel, forward and backward, on strided views.

Shapes: B batch, S query length, T key length, H query heads, K key-value heads, D head_dim. Tensors are (B, S, H, D) or
(B, T, K, D); lse is (B, H, S).

Forward merges the pieces of a row by log-sum-exp: out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i).
Backward hands each piece the *merged* out and lse, which makes the kernel's own formula the exact gradient of the joint
softmax: p = exp(s - lse), ds = p * (dout·v - sum(dout * out)). Low-precision results are accumulated in float32, or
kept and joined in one pass where the kernel can (`joining`).

In memory lse is (B, S, H), so that segments of lse stack over the batch exactly where those of the other tensors do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from .joining import are_joined, launches_of
from .kernel import WIDENING, DenseKernel, DensePiece, Joins, takes_dlse
from .limits import Limits
from .merging import accumulator_dtype, by_rows, merge_
from .schedule import Call, Rows, Schedule
from .slabs import Slab, is_stack, slabs_of, slabs_within, stacks_by_rows
from .tracing import span
from .turned import Mirrored, NegatedQueries

_JOINING = "pieces joined"


def widen_rows(dout: Tensor, dlse: Tensor, query: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`WIDENING` more columns that make a kernel's delta, sum(dout * out), into delta - dlse.

    Keys and values get as many columns of zeros; gradients then have them too. Returns dout, query and out.
    """
    dout, query, out = (functional.pad(x, (0, WIDENING)) for x in (dout, query, out))
    dout[..., -WIDENING] = dlse.transpose(1, 2)
    out[..., -WIDENING] = -1.0
    return dout, query, out


def _adoptable(schedule: Schedule, query: Tensor, key: Tensor, slabs: list[Slab]) -> bool:
    """True where the first call covers everything in one launch: its results, reshaped, are then the first sums.

    `slabs` are those of that call, none where it does not cover everything.
    """
    if len(slabs) != 1:
        return False
    call = schedule.calls[0]
    return is_stack(call.query, call.segments, query) and is_stack(call.key, call.segments, key)


@attrs.frozen(eq=False)
class RowsOfQueries:
    """A gradient of those queries that a call takes."""

    _slab: Slab
    _rows: Rows
    _grad: Tensor

    def add_to(self, total: Tensor) -> None:
        """Add it to the gradient of all queries (B, S, H, D); columns beyond D are left out."""
        self._slab.view(total, self._rows).add_(self._grad[..., : total.shape[3]])


@attrs.frozen(eq=False)
class Composer:
    """A dense kernel made to compute schedules.

    Attributes:
        kernel: computes one dense piece.
        scale: factor on q·k. The kernel only sees positive ones: flash kernels that mask and take maxima before they
            scale (aten's for CPUs among them) turn masked scores into +inf with a negative one.
        deterministic: passed on to the kernel.
        workspace_bytes: bound on the copies of rows that are read backwards, where pieces are merged in turns.
        dlse: what backward hands to a kernel that takes it (`TakesDlse`), (B, S, H) in memory.
    """

    kernel: DenseKernel
    scale: float
    deterministic: bool
    workspace_bytes: int = Limits().workspace_bytes
    dlse: Tensor | None = None
    _pieces: tuple[DensePiece, DensePiece] = attrs.field(init=False)
    _kernel: DenseKernel = attrs.field(init=False)
    _mirrored: DenseKernel = attrs.field(init=False)
    _joins: Joins | None = attrs.field(init=False)

    @_pieces.default
    def _make_pieces(self) -> tuple[DensePiece, DensePiece]:
        full = DensePiece(is_causal=False, scale=abs(self.scale), deterministic=self.deterministic)
        return full, attrs.evolve(full, is_causal=True)

    @_kernel.default
    def _make_kernel(self) -> DenseKernel:
        return self.kernel if self.scale > 0 else NegatedQueries(self.kernel)

    @_mirrored.default
    def _make_mirrored(self) -> DenseKernel:
        return Mirrored(self._kernel)

    @_joins.default
    def _find_joins(self) -> Joins | None:
        return self.kernel if isinstance(self.kernel, Joins) else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Return out (B, S, H, D), in the accumulator's dtype where pieces were merged in turns, and lse (B, H, S).

        Rows that no call touches have out 0 and lse -inf.
        """
        calls = schedule.calls
        if schedule.is_whole:
            return self._kernel.forward(query, key, value, self._piece(calls[0]))
        joined = self._forward_joined(query, key, value, calls)
        if joined is not None:
            return joined
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
            del first, first_lse  # not held while others are merged
            if len(calls) == 1:
                return out, lse
            out = out.to(dtype)
        else:
            out = (torch.empty if schedule.cover else torch.zeros)(query.shape, dtype=dtype, device=query.device)
            lse = torch.full((batch, length, heads), -math.inf, dtype=dtype, device=query.device).transpose(1, 2)
        self.merge_into(out, lse, query, key, value, calls[start:], written=schedule.cover - start)
        return out, lse

    def _forward_joined(
        self, query: Tensor, key: Tensor, value: Tensor, calls: Sequence[Call]
    ) -> tuple[Tensor, Tensor] | None:
        """What `forward` returns, of pieces that are joined in one pass; None where they are not."""
        if self._joins is None:
            return None
        launches = launches_of(calls, (query,), (key, value))
        places = [launch.of_queries for launch in launches]
        if not are_joined(self._joins, [(query, places)], adds=False):
            return None
        pieces = []
        for launch in launches:
            with span(launch.call.name):
                pieces.append(self._forward(launch.call, launch.slab, query, key, value))
        batch, length, heads, _ = query.shape
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        lse = torch.empty((batch, heads, length), dtype=torch.float32, device=query.device)
        with span(_JOINING):
            self._joins.merge_pieces(pieces, places, out, lse)
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
        assert stacks_by_rows(lse, calls)
        for index, call in enumerate(calls):
            with span(call.name):
                for slab in slabs_within(call, (query,), (key, value), self.workspace_bytes):
                    part, part_lse = self._forward(call, slab, query, key, value)
                    into, into_lse = slab.view(out, call.query), slab.view_lse(lse, call.query)
                    if index < written:
                        into.copy_(part)
                        into_lse.copy_(part_lse)
                    else:
                        merge_(into, into_lse, part, part_lse)

    def _forward(self, call: Call, slab: Slab, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        views = slab.view(query, call.query), slab.view(key, call.key), slab.view(value, call.key)
        out, lse = self._kernel_of(call).forward(*views, self._piece(call))
        return out, lse + math.log(call.weight) if call.weight > 1 else lse  # a pair counted twice only has more share

    def backward_through_lse(
        self,
        dout: Tensor,
        dlse: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        schedule: Schedule,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `backward`, where lse has a gradient too, (B, H, S)."""
        if takes_dlse(self.kernel):
            return attrs.evolve(self, dlse=by_rows(dlse)).backward(dout, query, key, value, out, lse, schedule)
        wide_dout, wide_query, wide_out = widen_rows(dout, dlse, query, out)
        wide_key, wide_value = (functional.pad(x, (0, WIDENING)) for x in (key, value))
        grads = self.backward(wide_dout, wide_query, wide_key, wide_value, wide_out, lse, schedule)
        dq, dk, dv = (grad[..., : query.shape[3]] for grad in grads)
        return dq, dk, dv

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, schedule: Schedule
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the calls, given the merged out and the merged lse (+inf in rows without keys)."""
        calls = schedule.calls
        if schedule.is_whole:
            return self._kernel.backward(dout, query, key, value, out, lse, self._piece(calls[0], self.dlse))
        joined = self._backward_joined(dout, query, key, value, out, lse, calls)
        if joined is not None:
            return joined
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
            del grads
            if len(calls) > 1:
                totals = [total.to(dtype) for total in totals]
        else:
            fill = torch.empty if schedule.cover else torch.zeros
            totals = [fill(x.shape, dtype=dtype, device=x.device) for x in inputs]
        dq, dk, dv = totals
        sums = (dq, dk, dv)
        self.backward_into(sums, dout, query, key, value, out, lse, calls[start:], written=schedule.cover - start)
        return sums

    def _backward_joined(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, calls: Sequence[Call]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """What `backward` returns, of pieces that are joined in one pass; None where they are not."""
        if self._joins is None:
            return None
        launches = launches_of(calls, (query, dout, out), (key, value))
        of_queries, of_keys = [launch.of_queries for launch in launches], [launch.of_keys for launch in launches]
        # Keys first: where they have fewer heads, least is held at once.
        sums = [(key, of_keys), (value, of_keys), (query, of_queries)]
        if not are_joined(self._joins, sums, adds=True):
            return None
        if not stacks_by_rows(lse, calls):
            lse = by_rows(lse)
        dqs, dks, dvs = [], [], []
        for launch in launches:
            with span(launch.call.name):
                dq, dk, dv = self._backward(launch.call, launch.slab, dout, query, key, value, out, lse)
            dqs.append(dq)
            dks.append(dk)
            dvs.append(dv)
        del dq, dk, dv
        totals = []
        with span(_JOINING):
            for pieces, (x, places) in zip((dks, dvs, dqs), sums, strict=True):
                total = torch.empty_like(x, memory_format=torch.contiguous_format)
                self._joins.add_pieces(pieces, places, total)
                pieces.clear()
                totals.append(total)
        dk, dv, dq = totals
        return dq, dk, dv

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
                for slab in slabs_within(call, (query, dout, out), (key, value), self.workspace_bytes):
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
        assert stacks_by_rows(lse, calls)
        found = []
        for call in calls:
            with span(call.name):
                for slab in slabs_within(call, (query, dout, out), (key, value), self.workspace_bytes):
                    dq, *grads = self._backward(call, slab, dout, query, key, value, out, lse)
                    for total, grad in zip(totals, grads, strict=True):
                        slab.view(total, call.key).add_(grad)
                    found.append(RowsOfQueries(slab, call.query, dq))
        return found

    def _backward(
        self, call: Call, slab: Slab, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        lse_view = slab.view_lse(lse, call.query)
        dlse = None if self.dlse is None else slab.view_lse(self.dlse, call.query)
        return self._kernel_of(call).backward(
            slab.view(dout, call.query),
            slab.view(query, call.query),
            slab.view(key, call.key),
            slab.view(value, call.key),
            slab.view(out, call.query),
            lse_view - math.log(call.weight) if call.weight > 1 else lse_view,
            self._piece(call, dlse),
        )

    def _kernel_of(self, call: Call) -> DenseKernel:
        return self._mirrored if call.is_mirrored else self._kernel

    def _piece(self, call: Call, dlse: Tensor | None = None) -> DensePiece:
        piece = self._pieces[call.is_causal]
        if call.window is None and dlse is None:
            return piece
        return attrs.evolve(piece, window=call.window, dlse=dlse)
