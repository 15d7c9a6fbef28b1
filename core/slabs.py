"""The strided views that one launch of a dense kernel takes of whole tensors, and where its results belong in them.

Shapes: B batch, S sequence, H heads, D head_dim. Tensors are (B, S, H, D); lse is (B, H, S).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
from torch import Tensor

from .limits import at_once
from .schedule import MOST_STACKED, Call, Rows


@attrs.frozen
class Place:
    """Where the results of one launch belong: of a tensor with heads, `batches` batch rows from `batch` on.

    Row i of head t of element (b * segments + s) of the results (batches * segments, rows.count, rows.num_heads, D) is
    row rows.start + s * rows.segment_step + i * rows.step + t * rows.head_shift of head rows.head + t * rows.head_step
    of batch row batch + b. No two elements meet.
    """

    rows: Rows
    segments: int
    batch: int
    batches: int

    @property
    def num_rows(self) -> int:
        """How many rows of heads it has."""
        return self.batches * self.segments * self.rows.count * self.rows.num_heads


@attrs.frozen
class Slab:
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

    def split(self, most: int) -> Iterator[Slab]:
        """Launches that together are this one, each of a stack of `most` at most."""
        for start in range(0, self.size, most):
            size = min(most, self.size - start)
            if self.along_batch:
                yield Slab(self.batch + start, self.segment, size, along_batch=True)
            else:
                yield Slab(self.batch, self.segment + start, size, along_batch=False)

    def place(self, rows: Rows, segments: int) -> Place:
        """Where the results for `rows` belong, of a call of so many segments."""
        if self.along_batch:
            start = rows.start + self.segment * rows.segment_step
            return Place(attrs.evolve(rows, start=start), 1, self.batch, self.size)
        return Place(rows, segments, self.batch, self.size // segments)

    def _start(self, rows: Rows, s_batch: int, s_row: int, s_head: int) -> int:
        row = rows.start + self.segment * rows.segment_step
        return self.batch * s_batch + row * s_row + rows.head * s_head


def slabs_of(call: Call, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...]) -> list[Slab]:
    """Cover a call with as few launches as the tensors' strides and `MOST_STACKED` allow."""
    batch = queries[0].shape[0]
    if call.segments == 1:
        return [Slab(0, 0, batch, along_batch=True)]
    if batch == 1 or (
        batch * call.segments <= MOST_STACKED
        and all(
            call.segments * rows.segment_step == x.shape[1] and x.stride(0) == x.shape[1] * x.stride(1)
            for xs, rows in ((queries, call.query), (keys, call.key))
            for x in xs
        )
    ):
        return [Slab(0, 0, batch * call.segments, along_batch=False)]
    if call.segments < batch:
        return [Slab(0, segment, batch, along_batch=True) for segment in range(call.segments)]
    return [Slab(row, 0, call.segments, along_batch=False) for row in range(batch)]


def slabs_within(call: Call, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], workspace_bytes: int) -> list[Slab]:
    """As `slabs_of`; those whose rows are copied, and whose results are, so that all copies stay within a workspace."""
    slabs = slabs_of(call, queries, keys)
    if not call.is_mirrored:
        return slabs
    each = sum(
        rows.count * rows.num_heads * x.shape[3] * x.element_size()
        for xs, rows in ((queries, call.query), (keys, call.key))
        for x in xs
    )
    most = max(1, at_once(workspace_bytes, queries[0]) // (2 * each))
    return [part for slab in slabs for part in slab.split(most)]


def is_stack(rows: Rows, segments: int, x: Tensor) -> bool:
    """True where the stacked segments are exactly the rows and heads of x, in their order."""
    return (
        rows.step == 1
        and rows.head_step == 1
        and rows.head_shift == 0
        and segments * rows.count == x.shape[1]
        and rows.num_heads == x.shape[2]
    )


def stacks_by_rows(lse: Tensor, calls: Sequence[Call]) -> bool:
    """Whether views of lse (B, H, S) stack where those of rows do: it lies by rows, or none stacks over the batch."""
    batch, heads, _ = lse.shape
    return batch == 1 or heads == 1 or lse.stride(1) == 1 or all(call.segments == 1 for call in calls)
