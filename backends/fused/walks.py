"""Which keys each row meets, as arithmetic progressions: the tables that the fused kernels walk.

Rows (queries; keys, for their gradients) are grouped by the branches that keep them. A group is the rows whose position
modulo `period` is in a set of residues, so that a tile of consecutive rows of one group needs one list of `Walk`s. A
walk is a progression of columns within the row's segment. Where segments nest, a column that several branches name is
met once, with the logarithm of its multiplicity added to its scores: LongNet's multiset (arXiv 2307.02486) then costs
what its distinct pairs cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Final

import attrs
import numpy as np
from numpy.typing import NDArray

from ...core.pattern import Branch

# Rows are grouped by their position modulo the least common multiple of the rates, up to this.
MAX_PERIOD: Final = 4096
# Up to this also by rates whose classes hold for one segment only: elsewhere looking at each row costs less.
_MAX_JOINED: Final = 64


class Mode(IntEnum):
    """Which columns of its segment a row at position p meets; `inner` is the segment length inside."""

    ALL = 0
    UP_TO_ROW = 1  # column <= p
    FROM_ROW = 2  # column >= p
    BEFORE_INNER = 3  # columns before the inner segment of p
    AFTER_INNER = 4  # columns after it


@attrs.frozen
class Walk:
    """Columns of a row's segment in arithmetic progression.

    Attributes:
        segment: segment length; 0 for one segment over all positions.
        stride: step of the progression.
        residue: positions of the columns modulo the stride; counted from the segment's start where `row_rate` is set.
        mode: which of them.
        inner: length of the segments that the two last modes speak of, else 1.
        weight: multiplicity of each pair.
        row_rate: 0, or: only rows whose place in the segment is `residue` modulo this are meant.
    """

    segment: int
    stride: int
    residue: int
    mode: Mode
    inner: int = 1
    weight: int = 1
    row_rate: int = 0


@attrs.frozen(eq=False)
class Tables:
    """Walks by kind of head and group of rows, as the kernels read them.

    Shapes: H heads, N kinds of heads, P period, G most groups of a kind, W most walks of a group.

    Attributes:
        period: P.
        head_kind: (H,) int32.
        slot_group, slot_index: (N, P) int32, the group of each of the P tiles of a block of rows, and which tile of the
            group it is; groups with many walks first.
        group_size, group_start: (N, G) int32, how many residues the group has, and where they start in `residues`.
        residues: (N, P) int32, ascending in each group.
        counts: (N, G) int32, walks of each group.
        walks: (N, G, W, 9) int32, the fields of `Walk` but its weight, and the binary logarithms, rounded down, of its
            segment, stride and inner.
        bias: (N, G, W) float32, binary logarithm of the weight.
        shifts: segments, strides and inner segments are powers of two everywhere.
    """

    period: int
    head_kind: NDArray[np.int32]
    slot_group: NDArray[np.int32]
    slot_index: NDArray[np.int32]
    group_size: NDArray[np.int32]
    group_start: NDArray[np.int32]
    residues: NDArray[np.int32]
    counts: NDArray[np.int32]
    walks: NDArray[np.int32]
    bias: NDArray[np.float32]
    shifts: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """P, G and W: how the tables are strided."""
        return self.period, self.counts.shape[1], self.walks.shape[2]

    def places_of_runs(self, rows: int, span: int) -> tuple[NDArray[np.int32], int]:
        """Room for what each of the P tiles of so many rows may meet, a run for each segment of each walk.

        Rows lie within `span` positions. Returns where each tile's places begin, (N, P) int32, and how many there are.
        """
        reach = np.minimum((-(-rows // self.group_size) + 1) * self.period, span)
        length = self.walks[..., 0]
        segments = np.where(length == 0, 1, reach[..., None] // np.maximum(length, 1) + 2)
        is_walk = np.arange(length.shape[2]) < self.counts[..., None]
        of_group = np.where(is_walk, segments, 0).sum(2)
        of_slot = np.take_along_axis(of_group, self.slot_group.astype(np.int64), 1)
        ends = of_slot.cumsum(1)
        return (ends - of_slot).astype(np.int32), max(1, int(ends.max()))


def period_of(branches: Sequence[Branch]) -> int:
    """Least common multiple of the rates of branches whose classes are the same in every segment, at any length."""
    return math.lcm(1, *(branch.stride for branch in branches if _repeats(branch)))


def _repeats(branch: Branch) -> bool:
    """Whether a place modulo the rate is the position modulo the rate in every segment."""
    return branch.segment_length is None or branch.segment_length % branch.stride == 0


def _classes(branches: Sequence[Branch], span: int) -> tuple[int, tuple[bool, ...]]:
    """The period of the groups of rows, and which branches they go by; the others look at each row by itself.

    Besides those of `period_of` a branch may go by classes where the first segment holds all positions.
    """
    period, regular = period_of(branches), []
    for branch in branches:
        fits = _repeats(branch)
        if not fits and 0 < span <= (branch.segment_length or 0):
            joined = math.lcm(period, branch.stride)
            fits = joined <= _MAX_JOINED
            period = joined if fits else period
        regular.append(fits)
    return period, tuple(regular)


def make_tables(
    branches: Sequence[Branch], *, is_causal: bool, transposed: bool, span: int, merge_from: int = 32
) -> Tables:
    """The tables for branches over positions below `span`.

    Args:
        branches: all with offsets for the same heads.
        is_causal: no query meets a later key.
        transposed: rows are keys and columns queries.
        span: one past the last position; 0 where some are negative.
        merge_from: fewest columns that a progression must have in a segment for columns of several branches to be
            met once.
    """
    period, regular = _classes(branches, span)
    if period > MAX_PERIOD:
        raise ValueError(f"the rates' least common multiple is {period}, allowed are {MAX_PERIOD}")
    heads = list(zip(*(branch.offsets for branch in branches), strict=True))
    kinds = sorted(set(heads), key=heads.index)
    planner = _Planner(tuple(branches), regular, is_causal, transposed, span, period, merge_from)
    groups = [planner.groups(offsets) for offsets in kinds]
    most_groups = max(len(of_kind) for of_kind in groups)
    most_walks = max(1, *(len(walks) for of_kind in groups for _, walks in of_kind))
    shape = (len(kinds), most_groups)
    tables = Tables(
        period=period,
        head_kind=np.array([kinds.index(offsets) for offsets in heads], dtype=np.int32),
        slot_group=np.zeros((len(kinds), period), dtype=np.int32),
        slot_index=np.zeros((len(kinds), period), dtype=np.int32),
        group_size=np.ones(shape, dtype=np.int32),
        group_start=np.zeros(shape, dtype=np.int32),
        residues=np.zeros((len(kinds), period), dtype=np.int32),
        counts=np.zeros(shape, dtype=np.int32),
        walks=np.zeros((*shape, most_walks, 9), dtype=np.int32),
        bias=np.zeros((*shape, most_walks), dtype=np.float32),
    )
    for kind, of_kind in enumerate(groups):
        _fill(tables, kind, of_kind)
    divisors = tables.walks[..., (0, 1, 4)]
    return attrs.evolve(tables, shifts=bool((divisors & (divisors - 1) == 0).all()))


def _fill(tables: Tables, kind: int, groups: list[tuple[list[int], list[Walk]]]) -> None:
    start = 0
    for group, (residues, walks) in enumerate(groups):
        end = start + len(residues)
        tables.slot_group[kind, start:end] = group
        tables.slot_index[kind, start:end] = np.arange(len(residues))
        tables.residues[kind, start:end] = residues
        tables.group_start[kind, group] = start
        tables.group_size[kind, group] = len(residues)
        tables.counts[kind, group] = len(walks)
        for index, walk in enumerate(walks):
            fields = (walk.segment, walk.stride, walk.residue, walk.mode, walk.inner, walk.row_rate)
            logs = (max(x, 1).bit_length() - 1 for x in (walk.segment, walk.stride, walk.inner))
            tables.walks[kind, group, index] = (*fields, *logs)
            tables.bias[kind, group, index] = math.log2(walk.weight)
        start = end


@attrs.frozen
class _Planner:
    branches: tuple[Branch, ...]
    regular: tuple[bool, ...]
    is_causal: bool
    transposed: bool
    span: int
    period: int
    merge_from: int

    def groups(self, offsets: tuple[int | None, ...]) -> list[tuple[list[int], list[Walk]]]:
        """Residues and walks of each group of rows of a head with these offsets, those with most branches first."""
        used = [(b, o, by) for b, o, by in zip(self.branches, offsets, self.regular, strict=True) if o is not None]
        regular = [(b, o) for b, o, by in used if by]
        others = [self._row_by_row(b, o) for b, o, by in used if not by]
        members: dict[tuple[int, ...], list[int]] = {}
        for residue in range(self.period):
            keep = tuple(i for i, (b, o) in enumerate(regular) if (residue - o) % b.stride == 0)
            members.setdefault(keep, []).append(residue)
        order = sorted(members, key=lambda keep: (-len(keep), keep))
        return [(members[keep], [*self._walks([regular[i] for i in keep]), *others]) for keep in order]

    def _walks(self, kept: list[tuple[Branch, int]]) -> list[Walk]:
        """Walks of a row that these branches keep, merged where their segments nest."""
        chains: list[list[tuple[Branch, int]]] = []
        outer = -1
        for branch, offset in sorted(kept, key=lambda one: -(self._length(one[0]) or math.inf)):
            length = self._length(branch)
            if outer == length or outer == 0 or (outer > 0 and length and outer % length == 0):
                chains[-1].append((branch, offset))
            else:
                chains.append([(branch, offset)])
            outer = length
        walks: list[Walk] = []
        for chain in chains:
            merged = self._merged(chain)
            walks += [self._plain(b, o) for b, o in chain] if merged is None else merged
        return walks

    def _plain(self, branch: Branch, offset: int) -> Walk:
        """One branch by itself."""
        return Walk(self._length(branch), branch.stride, offset, self._own_mode(), weight=branch.weight)

    def _row_by_row(self, branch: Branch, offset: int) -> Walk:
        """A branch that the groups do not go by; its classes count from the start of each segment."""
        length = self._length(branch) or self.span
        return Walk(length, branch.stride, offset, self._own_mode(), weight=branch.weight, row_rate=branch.stride)

    def _length(self, branch: Branch) -> int:
        """Its segment length, 0 where all positions lie in one segment."""
        length = branch.segment_length
        return 0 if length is None or 0 < self.span <= length else length

    def _own_mode(self) -> Mode:
        if not self.is_causal:
            return Mode.ALL
        return Mode.FROM_ROW if self.transposed else Mode.UP_TO_ROW

    def _merged(self, kept: list[tuple[Branch, int]]) -> list[Walk] | None:
        """Each column once: those of the innermost segment, then of each segment around it.

        None for a single branch, and where a progression would be too short.
        """
        lengths = sorted({self._length(branch) for branch, _ in kept}, key=lambda w: w or math.inf)
        if len(kept) < 2:
            return None
        walks: list[Walk] = []
        for level, length in enumerate(lengths):
            counted = [(b, o) for b, o in kept if self._length(b) in lengths[level:]]
            inner = lengths[level - 1] if level else 1
            modes: tuple[Mode, ...] = (Mode.BEFORE_INNER, Mode.AFTER_INNER)
            if self.is_causal:
                modes = modes[1:] if self.transposed else modes[:1]
            for stride, residue, weight in _progressions(counted):
                if (length or self.span) // stride < self.merge_from:
                    return None
                for mode in modes if level else (self._own_mode(),):
                    walks.append(Walk(length, stride, residue, mode, inner, weight))
        return walks


def _progressions(counted: list[tuple[Branch, int]]) -> Iterator[tuple[int, int, int]]:
    """Stride, residue and multiplicity of progressions that hold every counted position once."""
    period = math.lcm(*(branch.stride for branch, _ in counted))
    weights = [sum(b.weight for b, o in counted if (x - o) % b.stride == 0) for x in range(period)]

    def split(stride: int, residue: int) -> Iterator[tuple[int, int, int]]:
        found = weights[residue::stride]
        if len(set(found)) == 1:
            if found[0]:
                yield stride, residue, found[0]
            return
        factor = next(f for f in range(2, period + 1) if (period // stride) % f == 0)
        for part in range(factor):
            yield from split(stride * factor, residue + stride * part)

    yield from split(1, 0)
