"""Queries of a shard against one tensor of keys, and how the results of such pieces are brought together.

Shapes: B batch, S queries of the shard, T keys, H query heads, K key-value heads, D head_dim. lse is (B, H, S).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from ..core.block_product import BlockProduct
from ..core.composer import Composer, widen_rows
from ..core.empty import empty_gradients, empty_results
from ..core.kernel import Adds, LayoutKernel, LayoutPiece, takes_dlse
from ..core.merging import accumulator_dtype, by_rows, delta_of, merge_
from ..core.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Iterable


def mergeable(out: Tensor, lse: Tensor, *, once: bool = False) -> tuple[Tensor, Tensor]:
    """`out` and `lse` as pieces are merged into them: contiguous in the accumulator's dtype, and as it is.

    Where no row is merged into more than `once`, `out` keeps its dtype: one more rounding costs less than passes over
    whole tensors of twice the size.
    """
    out = out if once else out.to(lse.dtype)
    return out.contiguous(), lse


@attrs.define(eq=False)
class WholeRows:
    """What the backward of every piece needs of the whole rows.

    Whatever is not given is made when first asked for; `Piece.read` asks for all that a piece needs.

    Attributes:
        dout: (B, S, H, D), and query and out alike.
        dlse: (B, H, S) contiguous, or None.
        query: see dout.
        out: see dout.
        lse: (B, H, S) contiguous, -inf in rows without keys.
    """

    dout: Tensor
    dlse: Tensor | None
    query: Tensor
    out: Tensor
    lse: Tensor
    _sums: Tensor | None = attrs.field(default=None, init=False)

    @property
    def dtype(self) -> torch.dtype:
        """The accumulator's."""
        return accumulator_dtype(self.query.dtype)

    @cached_property
    def delta(self) -> Tensor:
        """(B, H, S), sum(dout * out) - dlse."""
        return delta_of(self.dout, self.dlse, self.out)

    @cached_property
    def row_lse(self) -> Tensor:
        """`lse` as dense kernels take it: (B, S, H) in memory, +inf in rows without keys."""
        lse = by_rows(self.lse)
        return torch.where(lse == -math.inf, math.inf, lse)

    @cached_property
    def row_dlse(self) -> Tensor | None:
        """`dlse` as dense kernels take it that do: (B, S, H) in memory."""
        return None if self.dlse is None else by_rows(self.dlse)

    @cached_property
    def wide(self) -> tuple[Tensor, Tensor, Tensor]:
        """dout, query and out, with `WIDENING` more columns where lse has a gradient."""
        if self.dlse is None:
            return self.dout, self.query, self.out
        return widen_rows(self.dout, self.dlse, self.query, self.out)

    def widened(self, x: Tensor) -> Tensor:
        """Keys or values with as many columns as `wide`."""
        return x if self.dlse is None else functional.pad(x, (0, self.wide[1].shape[3] - x.shape[3]))

    def sums(self, adds: Adds) -> Tensor:
        """What a kernel needs of the rows, the same for all pieces."""
        if self._sums is None:
            self._sums = adds.row_sums(self.dout, self.out, self.lse, self.dlse)
        return self._sums


@attrs.define(eq=False)
class Merged:
    """The sum of the gradients that pieces give to queries.

    Attributes:
        rows: what they are computed from.
        once: received rows add to no row's gradient more than once, so that the sum is of the queries' dtype.
    """

    rows: WholeRows
    once: bool = False
    _dq: Tensor | None = attrs.field(default=None, init=False)
    _later: list[Later] = attrs.field(factory=list, init=False)

    def add(self, dq: Tensor) -> None:
        """Add a gradient of all queries, (B, S, H, D), a tensor of its own; the first one is taken as it is."""
        self._dq = dq if self._dq is None else self._dq.to(self._sum_dtype).add_(dq)

    def add_rows(self, rows: Iterable[Later]) -> None:
        """Add gradients of some queries, once all others are there: no other row is touched for them."""
        self._later += rows

    def add_sum(self, other: Merged) -> None:
        """Add another sum, which is done."""
        if other._dq is not None:
            self.add(other._dq)
        self._later += other._later

    @property
    def _sum_dtype(self) -> torch.dtype:
        return self.rows.query.dtype if self.once else self.rows.dtype

    def sums(self) -> Tensor:
        """The sum so far, (B, S, H, D) contiguous, for gradients of some queries to be added."""
        if self._dq is None:
            query = self.rows.query
            self._dq = torch.zeros(query.shape, dtype=self._sum_dtype, device=query.device)
        self._dq = self._dq.to(self._sum_dtype).contiguous()
        return self._dq

    def settle(self) -> None:
        """Add what `add_rows` was given; for when all other gradients are there."""
        for rows in self._later:
            rows.add_to(self.sums())
        self._later.clear()

    def dq(self) -> Tensor:
        """The gradient of the queries, contiguous in their dtype."""
        self.settle()
        query = self.rows.query
        total = torch.zeros_like(query) if self._dq is None else self._dq
        return total.to(query.dtype).contiguous()


class Later(Protocol):
    """A gradient of some queries."""

    def add_to(self, total: Tensor) -> None:
        """Add it to the gradient of all queries (B, S, H, D), contiguous, in place."""


class Piece(Protocol):
    """Queries of the shard against one tensor of keys; a batch row counts `pairs`."""

    @property
    def pairs(self) -> int:
        """Pairs that a batch row counts."""

    @property
    def is_empty(self) -> bool:
        """Nothing to compute."""

    @property
    def merges(self) -> int:
        """How often it merges into a row at most."""

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh out and lse as the kernel gives them; `mergeable` prepares them for other pieces."""

    def merge_into(self, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Merge this piece into what `mergeable` returned."""

    def read(self, rows: WholeRows) -> None:
        """Have all that `backward` needs of the rows made, so that it may run beside another piece's."""

    def backward(self, merged: Merged, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add to `merged`; return dk and dv, (B, T, K, D) in the inputs' or the accumulator's dtype."""


@attrs.frozen(eq=False)
class ComposedPiece:
    """A `Piece` of dense calls and a table of blocks, which core composes."""

    composer: Composer
    schedule: Schedule
    blocks: BlockProduct | None
    pairs: int
    merges: int = attrs.field(init=False)

    @merges.default
    def _count_merges(self) -> int:
        """Calls of one name are of one branch, and no row is in two of them."""
        return len({call.name for call in self.schedule.calls}) + (self.blocks is not None)

    @property
    def is_empty(self) -> bool:
        """As `Piece.is_empty`."""
        return not self.schedule.calls and self.blocks is None

    @property
    def nbytes(self) -> int:
        """As `Piece.nbytes`."""
        return self.schedule.nbytes + (0 if self.blocks is None else self.blocks.nbytes)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Piece.forward`."""
        if self.blocks is None:
            return self.composer.forward(query, key, value, self.schedule)
        out, lse = mergeable(*self.blocks.forward(query, key, value))
        lse = by_rows(lse)
        self.composer.merge_into(out, lse, query, key, value, self.schedule.calls)
        return out, lse

    def merge_into(self, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        """As `Piece.merge_into`."""
        self.composer.merge_into(out, lse, query, key, value, self.schedule.calls)
        if self.blocks is not None:
            merge_(out, lse, *self.blocks.forward(query, key, value))

    def read(self, rows: WholeRows) -> None:
        """As `Piece.read`."""
        if self.blocks is not None:
            _ = rows.delta, rows.row_lse
        if self.schedule.calls:
            _ = rows.row_dlse if takes_dlse(self.composer.kernel) else rows.wide, self._lse_of(rows)

    def _lse_of(self, rows: WholeRows) -> Tensor:
        """lse as the dense calls take it."""
        calls = self.schedule.calls
        # A row of a call has keys: where no other rows are stacked with it, its lse is finite.
        as_it_is = not self.schedule.cover and self.merges == 1 and all(call.segments == 1 for call in calls)
        return rows.lse if as_it_is else rows.row_lse

    def backward(self, merged: Merged, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Piece.backward`."""
        if self.blocks is None:
            return self._dense_backward(merged, key, value)
        rows = merged.rows
        dq, dk, dv = self.blocks.backward(rows.dout, rows.query, key, value, rows.delta, rows.row_lse)
        merged.add(dq)
        if self.schedule.calls:
            more_k, more_v = self._dense_backward(merged, key, value)
            dk, dv = dk + more_k, dv + more_v
        return dk, dv

    def _dense_backward(self, merged: Merged, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`backward` of the dense calls."""
        composer, rows, head_dim = self.composer, merged.rows, key.shape[3]
        if takes_dlse(composer.kernel):
            composer = attrs.evolve(composer, dlse=rows.row_dlse)
            inputs = rows.dout, rows.query, key, value, rows.out
        else:
            dout, query, out = rows.wide
            inputs = dout, query, rows.widened(key), rows.widened(value), out
        lse = self._lse_of(rows)
        if self.schedule.cover:
            dq, dk, dv = composer.backward(*inputs, lse, self.schedule)
            merged.add(dq[..., :head_dim])
            return dk[..., :head_dim], dv[..., :head_dim]
        dk, dv = (torch.zeros(x.shape, dtype=rows.dtype, device=x.device) for x in inputs[2:4])
        calls = self.schedule.calls
        if self.merges == 1:
            merged.add_rows(composer.backward_of_keys((dk, dv), *inputs, lse, calls))
        elif rows.dlse is None and not merged.once:
            composer.backward_into((merged.sums(), dk, dv), *inputs, lse, calls)
        else:  # a sum of half precision would round each addition
            dq = torch.zeros(inputs[1].shape, dtype=rows.dtype, device=key.device)
            composer.backward_into((dq, dk, dv), *inputs, lse, calls)
            merged.add(dq[..., :head_dim])
        return dk[..., :head_dim], dv[..., :head_dim]


@attrs.frozen(eq=False)
class WholePiece:
    """A `Piece` that a kernel for whole layouts computes in one go.

    Attributes:
        kernel: see there.
        piece: what it computes.
        pairs: see `Piece`.
        nbytes: see `Piece`.
        adds: the kernel, where it can add what staged blocks give to what its own keys gave.
        is_staged: it is over keys that were copied together, which stay as they are for the whole pass.
    """

    kernel: LayoutKernel
    piece: LayoutPiece
    pairs: int
    nbytes: int
    adds: Adds | None = None
    is_staged: bool = False

    @property
    def is_empty(self) -> bool:
        """As `Piece.is_empty`."""
        return not self.pairs

    @property
    def merges(self) -> int:
        """As `Piece.merges`."""
        return 1

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Piece.forward`."""
        return self.kernel.forward(query, key, value, self.piece)

    def merge_into(self, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        """As `Piece.merge_into`."""
        if self.adds is not None and self.is_staged:
            self.adds.merge(out, lse, query, key, value, self.piece)
        else:
            merge_(out, lse, *self.kernel.forward(query, key, value, self.piece))

    def read(self, rows: WholeRows) -> None:
        """As `Piece.read`."""
        if self.adds is not None:
            rows.sums(self.adds)

    def backward(self, merged: Merged, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Piece.backward`."""
        if self.adds is not None:
            return self._backward_in_parts(self.adds, merged, key, value)
        rows = merged.rows
        given = rows.dout, rows.query, key, value, rows.out, rows.lse
        dq, dk, dv = self.kernel.backward(*given, self.piece, dlse=rows.dlse)
        merged.add(dq)
        return dk, dv

    def _backward_in_parts(self, adds: Adds, merged: Merged, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`backward`, the gradient of queries once own keys' is there, where this is not theirs."""
        rows = merged.rows
        given = rows.dout, rows.query, key, value, rows.sums(adds), self.piece
        if self.is_staged:
            merged.add_rows([_QueriesOfPiece(adds, given)])
            return adds.gradients_of_keys(*given)
        dq, dk, dv = adds.gradients(*given)
        merged.add(dq)
        return dk, dv


@attrs.frozen(eq=False)
class _QueriesOfPiece:
    """The gradient of queries over staged keys, still to be computed."""

    adds: Adds
    rows: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, LayoutPiece]

    def add_to(self, total: Tensor) -> None:
        """As `Later.add_to`."""
        self.adds.gradients_of_queries(*self.rows, total)


@attrs.frozen
class EmptyPiece:
    """A `Piece` without pairs, which no kernel is asked for."""

    pairs: int = 0
    nbytes: int = 0
    is_empty: bool = True
    merges: int = 0

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Piece.forward`."""
        return empty_results(query)

    def merge_into(self, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        """As `Piece.merge_into`."""

    def read(self, rows: WholeRows) -> None:
        """As `Piece.read`."""

    def backward(self, merged: Merged, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Piece.backward`."""
        return empty_gradients(merged.rows.query, key, value)[1:]
