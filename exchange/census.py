"""How many rows of strided branches every rank receives and sends, counted for all ranks at once.

What a head's branches name before a shard are progressions that end at the shard, what they name after it such that
begin there. Cut where the next one begins, a few residue classes remain in each stretch, most of them nested or
disjoint, and inclusion and exclusion counts the rest. Which classes remain is decided once for all ranks whose
progressions come in the same order and meet in the same way; numbers are arrays over such ranks. R ranks, n of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from math import gcd, inf
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

from ..core.blocking import group_rows
from ..core.counting import shard_pairs
from .owners import Owners, positions
from .progressions import BranchRows, Offsets

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..core.pattern import IntArray

_NUMBERS_AT_ONCE: Final = 1 << 22  # 32 MiB an array, of which a side holds one for each of its progressions


@attrs.frozen(eq=False)
class RowTotals:
    """Rows that each rank receives and sends in a forward pass; (R,) int64."""

    received: IntArray
    sent: IntArray


@attrs.frozen(order=True)
class Lane:
    """A branch as one head uses it.

    Attributes:
        width: of its segments; 0 for a single one over everything.
        stride: see `Branch`.
        offset: see `Branch`.
    """

    width: int
    stride: int
    offset: int

    @property
    def segments(self) -> tuple[int, int]:
        """Lanes that are equal in this begin and end in the same places: the width, and where a segment is entered."""
        return self.width, self.offset // self.stride * self.stride if self.width else 0

    @property
    def is_steady(self) -> bool:
        """The positions of all segments are congruent."""
        return self.width % self.stride == 0

    def cell(self, grain: int) -> int | None:
        """What of the offset tells between multiples of `grain`, to which the width belongs; None: all of it.

        An interval between such multiples holds a whole number of strides, or strides are whole cells of it: then
        only the cell that the offset lies in counts.
        """
        if grain % self.stride == 0:
            return 0
        return None if self.stride % grain else self.offset // grain


def branch_totals(branches: BranchRows) -> RowTotals:
    """The rows that the branches name, of all ranks."""
    shards = branches.shards
    owners, received = Owners(shards.length, shards.size), np.zeros(shards.size, dtype=np.int64)
    for lanes, heads in _kinds(branches).items():
        for ranks, low, high, sign, stride, residue in terms(branches, lanes, 0, shards.size):
            received[ranks] += sign * heads * positions(low, high, stride, residue)
            owners.add(low, high, stride, residue, sign * heads)
    return RowTotals(received, owners.rows)


def terms(
    branches: BranchRows, lanes: tuple[Lane, ...], first: int, stop: int
) -> Iterator[tuple[IntArray, IntArray, IntArray, int, int, IntArray]]:
    """Signed progressions whose sum counts, for each of ranks first:stop, what any of its `lanes` names of others.

    Yields (ranks, low, high, sign, stride, residue): arrays (n,), but a residue that all share, (1,).
    """
    step = max(1, _NUMBERS_AT_ONCE // max(1, len(lanes)))
    for begin in range(first, stop, step):
        ranks = np.arange(begin, min(begin + step, stop), dtype=np.int64)
        for is_after in (False,) if branches.shards.is_causal else (False, True):
            side = _Side.of(branches, lanes, ranks, is_after=is_after)
            for low, high, sign, stride, residue, some in side.counted():
                yield ranks[some], low, high, sign, stride, residue


def pair_counts(branches: BranchRows) -> Iterator[tuple[int, IntArray]]:
    """Addends of the pairs that each rank's queries count: how often, and how many pairs, (R,) int64."""
    shards = branches.shards
    for branch in branches.branches:
        grain = gcd(shards.length, branch.segment_length or 0)
        offsets: dict[object, tuple[int, int]] = {}
        for offset in branch.offsets:
            if offset is not None:
                cell = Lane(branch.segment_length or 0, branch.stride, offset).cell(grain)
                key = (offset // branch.stride, offset if cell is None else cell)
                first, heads = offsets.get(key, (offset, 0))
                offsets[key] = first, heads + 1
        for offset, heads in offsets.values():
            pairs = shard_pairs(branch, offset, shards.length, shards.size, is_causal=shards.is_causal)
            yield branch.weight * heads, pairs


def _kinds(branches: BranchRows) -> dict[tuple[Lane, ...], int]:
    """The lanes of key-value heads whose rows are as many and lie in the same shards, and how many such heads are.

    Heads differ in their offsets alone. Where these lie in the same cells between the ends of segments and shards, and
    as far from each other, they make no difference to any number.
    """
    known: dict[object, tuple[Lane, ...]] = {}
    found: dict[tuple[Lane, ...], int] = {}
    grain = gcd(branches.shards.length, *(branch.segment_length or 0 for branch in branches.branches))
    for kind in branches.heads:
        lanes = lanes_of(branches, kind)
        cells = [lane.cell(grain) for lane in lanes]
        apart = [(a.offset - b.offset) % gcd(a.stride, b.stride) for a, b in combinations(lanes, 2)]
        shapes = [(lane.stride, lane.segments) for lane in lanes]
        key = lanes if None in cells else (*shapes, *cells, *apart)
        if not lanes:
            continue
        lanes = known.setdefault(key, lanes)
        found[lanes] = found.get(lanes, 0) + 1
    return found


def lanes_of(branches: BranchRows, kind: frozenset[Offsets]) -> tuple[Lane, ...]:
    """The lanes of a head of `BranchRows.heads`, ascending."""
    found = {
        Lane(branch.segment_length or 0, branch.stride, offset)
        for offsets in kind
        for branch, offset in zip(branches.branches, offsets, strict=True)
        if offset is not None
    }
    return tuple(sorted(found))


@attrs.frozen(eq=False)
class _Side:
    """What some lanes of some ranks name on one side of their shards.

    Attributes:
        lanes: whose progressions they are.
        near: where the shards end on this side, (n,).
        far: of each lane, where its progression begins (before a shard) or ends (after it), (n,); `near` where no
            query of the shard takes part.
        residues: of each lane, that of its positions modulo its stride, (n,) or (1,).
        is_after: which side.
    """

    lanes: tuple[Lane, ...]
    near: IntArray
    far: list[IntArray]
    residues: list[IntArray]
    is_after: bool

    @classmethod
    def of(cls, branches: BranchRows, lanes: tuple[Lane, ...], ranks: IntArray, *, is_after: bool) -> _Side:
        """Those of `ranks`."""
        length, seq_len = branches.shards.length, branches.shards.seq_len
        q_low, q_high = ranks * length, (ranks + 1) * length
        near, inside = (q_high, q_high - 1) if is_after else (q_low, q_low)
        far, residues = [], []
        for lane in lanes:
            base = inside // lane.width * lane.width if lane.width else np.zeros_like(inside)
            end = base + (lane.width or seq_len)
            begin = base + lane.segments[1]
            residue = (base[:1] + lane.offset if lane.is_steady else base + lane.offset) % lane.stride
            edge = np.maximum(np.minimum(end, seq_len), near) if is_after else np.minimum(begin, near)
            queries = positions(np.maximum(begin, q_low), np.minimum(end, q_high), lane.stride, residue) > 0
            far.append(np.where(queries, edge, near))
            residues.append(residue)
        return cls(lanes, near, far, residues, is_after)

    def counted(self) -> Iterator[tuple[IntArray, IntArray, int, int, IntArray, IntArray]]:
        """Signed progressions (low, high, sign, stride, residue) whose sum counts the union, and of which ranks."""
        for some, order in self._alike():
            residues = [r if r.size == 1 else r[some] for r in self.residues]
            edges = [*(self.far[lane][some] for lane in order), self.near[some]]
            segments = [*(self.lanes[lane].segments for lane in order), None]
            for inner, (outer_edge, inner_edge) in enumerate(pairwise(edges)):
                if segments[inner] == segments[inner + 1]:
                    continue
                low, high = (inner_edge, outer_edge) if self.is_after else (outer_edge, inner_edge)
                classes = [(self.lanes[lane].stride, residues[lane]) for lane in order[: inner + 1]]
                for sign, stride, residue in _signed(_maximal(classes)):
                    yield low, high, sign, stride, residue, some

    def _alike(self) -> Iterator[tuple[IntArray, list[int]]]:
        """Ranks whose progressions come in the same order and are congruent in the same places; and that order.

        From the farthest one to the nearest, without empty ones.
        """
        away = [np.abs(far - self.near) for far in self.far]
        order = self._order(away)
        meets = [self._meet(a, b) for a, b in combinations(range(len(self.lanes)), 2)]
        columns = [*order, *(x > 0 for x in away), *(meet for meet in meets if meet is not None)]
        table = np.stack([np.broadcast_to(column, self.near.shape) for column in columns], axis=-1)
        first, kind = group_rows(table.astype(np.int64))
        by_kind = np.split(np.argsort(kind, kind="stable"), np.cumsum(np.bincount(kind))[:-1])
        for index, some in zip(first, by_kind, strict=True):
            lanes = [int(lane[index % lane.size]) for lane in order]
            yield some, [lane for lane in lanes if away[lane][index] > 0]

    def _order(self, away: Sequence[IntArray]) -> list[IntArray]:
        """The lanes from the farthest to the nearest, place by place, (n,) or, where no rank differs, (1,)."""
        widths = [lane.width for lane in self.lanes if lane.width]
        if all(b % a == 0 for a, b in pairwise(widths)) and all(lane.offset < lane.stride for lane in self.lanes):
            nested = sorted(range(len(self.lanes)), key=lambda lane: self.lanes[lane].width or inf, reverse=True)
            return [np.array([lane]) for lane in nested]
        return list(np.argsort(-np.stack(away), axis=0, kind="stable"))

    def _meet(self, a: int, b: int) -> NDArray[np.bool_] | None:
        """Where positions of two lanes coincide, (n,); None where no rank differs."""
        common, apart = gcd(self.lanes[a].stride, self.lanes[b].stride), self.residues[a] - self.residues[b]
        return None if apart.size == 1 or common == 1 else apart % common == 0


def _maximal(classes: Sequence[tuple[int, IntArray]]) -> list[tuple[int, IntArray]]:
    """Those residue classes (stride, residue) that lie in no other; the first rank stands for all."""
    kept: list[tuple[int, IntArray]] = []
    for stride, residue in sorted(classes, key=lambda each: each[0]):
        if not any(stride % other == 0 and (residue[0] - r[0]) % other == 0 for other, r in kept):
            kept.append((stride, residue))
    return kept


def _signed(classes: Sequence[tuple[int, IntArray]]) -> list[tuple[int, int, IntArray]]:
    """Signed residue classes (sign, stride, residue) whose sum counts the union of `classes`."""
    terms: list[tuple[int, int, IntArray]] = []
    for stride, residue in classes:
        new = [(1, stride, residue)]
        for sign, other, r in terms:
            common = gcd(stride, other)
            if (int(residue[0]) - int(r[0])) % common:
                continue
            # Chinese remainder: r + other * t is congruent to residue modulo stride.
            step = stride // common
            wide = max(step * step, other * step) >= 1 << 62  # Python's integers, which have no end
            r, wanted = (x.astype(object) if wide else x for x in (r, residue))
            t = (wanted - r) // common % step * (pow(other // common, -1, step) if step > 1 else 0) % step
            new.append((-sign, other * step, (r + other * t) % (other * step)))
        terms += new
    return terms
