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
from typing import Final, NamedTuple

import attrs
import numpy as np
from numpy.typing import NDArray

from ...core.geometry import about_as_long
from ...core.pattern import Branch

# Rows are grouped by their position modulo the least common multiple of rates, up to this.
MAX_PERIOD: Final = 4096
# Up to this also by rates whose classes hold for one segment only.
_MAX_JOINED: Final = 64
_ROWS: Final = 128  # of a tile, for estimates
_COLUMNS: Final = 64


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
        occurrence: which it is of its pairs, where occurrences are apart.
    """

    segment: int
    stride: int
    residue: int
    mode: Mode
    inner: int = 1
    weight: int = 1
    row_rate: int = 0
    occurrence: int = 0


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
        bias: (N, G, W) float32, binary logarithm of the weight; or of walks apart, which all have the weight 1, which
            occurrence they are.
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
    """Least common multiple of the rates that rows have to be grouped by at any length."""
    return math.lcm(1, *(branch.stride for branch in branches if branch.segment_length is None))


def roomy_span(branches: Sequence[Branch], span: int) -> int:
    """A bound of the positions below `span`, the same for others that are about as many, with which tables do for both.

    Up to an eighth above, or where a segment ends: those that hold all positions then still do.
    """
    ends = (branch.segment_length for branch in branches if branch.segment_length is not None)
    return min([about_as_long(span, 1, span), *(end for end in ends if end >= span)])


def _repeats(branch: Branch, span: int) -> bool:
    """Whether a place modulo the rate is the position modulo the rate, in every segment that holds positions."""
    length = branch.segment_length
    return length is None or length % branch.stride == 0 or 0 < span <= length


def make_tables(
    branches: Sequence[Branch],
    *,
    is_causal: bool,
    transposed: bool,
    span: int,
    merge_from: int = 32,
    apart: tuple[int, ...] = (),
) -> Tables:
    """The tables for branches over positions below `span`.

    Args:
        branches: all with offsets for the same heads.
        is_causal: no query meets a later key.
        transposed: rows are keys and columns queries.
        span: one past the last position; 0 where some are negative.
        merge_from: fewest columns that a progression must have in a segment for columns of several branches to be
            met once.
        apart: which occurrence each branch is. Columns of several are then met once for each, from rows and from
            columns alike, and branches have the weight 1.
    """
    assert not apart or all(branch.weight == 1 for branch in branches)
    heads = list(zip(*(branch.offsets for branch in branches), strict=True))
    kinds = sorted(set(heads), key=heads.index)
    planner = _Planner(tuple(branches), is_causal, transposed, span, merge_from, apart).best(kinds[0])
    period, groups = planner.period, [planner.groups(offsets) for offsets in kinds]
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
        _fill(tables, kind, of_kind, apart=bool(apart))
    divisors = tables.walks[..., (0, 1, 4)]
    return attrs.evolve(tables, shifts=bool((divisors & (divisors - 1) == 0).all()))


def _fill(tables: Tables, kind: int, groups: list[tuple[list[int], list[Walk]]], *, apart: bool) -> None:
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
            tables.bias[kind, group, index] = walk.occurrence if apart else math.log2(walk.weight)
        start = end


class _Kept(NamedTuple):
    """A branch that keeps a row, with the offset that it has for the head, and which occurrence of its pairs it is."""

    branch: Branch
    offset: int
    occurrence: int


@attrs.frozen
class _Planner:
    """Groups of rows and their walks, where rows are grouped by the rates up to `most_rate`.

    A tile of rows of a rare class lies within many segments of other branches, and walks through all of them. So a rare
    branch may cost less where each row is looked at by itself.
    """

    branches: tuple[Branch, ...]
    is_causal: bool
    transposed: bool
    span: int
    merge_from: int
    apart: tuple[int, ...]
    most_rate: int = 1
    regular: tuple[bool, ...] = attrs.field(init=False)  # whether rows are grouped by a branch's classes

    @regular.default
    def _find_regular(self) -> tuple[bool, ...]:
        found = [self._is_grouped(branch) for branch in self.branches]
        period = math.lcm(1, *(branch.stride for branch, fits in zip(self.branches, found, strict=True) if fits))
        for index, branch in enumerate(self.branches):
            joined = math.lcm(period, branch.stride)
            if branch.stride <= self.most_rate and _repeats(branch, self.span) and joined <= _MAX_JOINED:
                found[index], period = True, joined
        return tuple(found)

    def _is_grouped(self, branch: Branch) -> bool:
        """Whether rows are grouped by its classes whatever the period becomes."""
        if branch.segment_length is None:
            return branch.stride <= self.most_rate or not self.span  # its classes have no other beginning
        return branch.stride <= self.most_rate and branch.segment_length % branch.stride == 0

    def best(self, offsets: tuple[int | None, ...]) -> _Planner:
        """The one for these branches, of any `most_rate`, under which a head with these offsets meets fewest columns.

        Raises:
            ValueError: none has a period up to `MAX_PERIOD`.
        """
        rates = sorted({1, *(branch.stride for branch in self.branches)}, reverse=True)
        planners = [attrs.evolve(self, most_rate=rate) for rate in rates]
        allowed = [planner for planner in planners if planner.period <= MAX_PERIOD]
        if not allowed:
            period = planners[-1].period
            raise ValueError(f"the rates' least common multiple is {period}, allowed are {MAX_PERIOD}")
        return min(allowed, key=lambda planner: planner.cost(offsets))  # of equals the first, with the most classes

    @property
    def period(self) -> int:
        """Of the groups."""
        return math.lcm(1, *(b.stride for b, regular in zip(self.branches, self.regular, strict=True) if regular))

    def groups(self, offsets: tuple[int | None, ...]) -> list[tuple[list[int], list[Walk]]]:
        """Residues and walks of each group of rows of a head with these offsets, those with most branches first."""
        of_branches = zip(self.branches, offsets, self.regular, self.apart or (0,) * len(offsets), strict=True)
        used = [(_Kept(b, o, i), by) for b, o, by, i in of_branches if o is not None]
        regular = [kept for kept, by in used if by]
        others = [kept for kept, by in used if not by]
        members: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        period = self.period
        for residue in range(period):
            keep = tuple(i for i, (b, o, _) in enumerate(regular) if (residue - o) % b.stride == 0)
            beside = tuple(i for i, kept in enumerate(others) if self._may_keep(kept, residue, period))
            members.setdefault((keep, beside), []).append(residue)
        order = sorted(members, key=lambda kept: (-len(kept[0]) - len(kept[1]), kept))
        return [
            (
                members[keep, beside],
                [*self._walks([regular[i] for i in keep]), *(self._row_by_row(others[i]) for i in beside)],
            )
            for keep, beside in order
        ]

    def _may_keep(self, kept: _Kept, residue: int, period: int) -> bool:
        """Whether a row of this residue can be of the branch's class, in any segment."""
        branch, offset, _ = kept
        return not _repeats(branch, self.span) or (residue - offset) % math.gcd(period, branch.stride) == 0

    def cost(self, offsets: tuple[int | None, ...]) -> float:
        """About how many columns a tile of rows meets, in whole steps."""
        period, whole = self.period, self.span or max(branch.segment_length or 1 for branch in self.branches)
        shares = ((len(residues) / period, walks) for residues, walks in self.groups(offsets))
        return sum(share * sum(_columns(walk, _ROWS / share, whole) for walk in walks) for share, walks in shares)

    def _walks(self, kept: list[_Kept]) -> list[Walk]:
        """Walks of a row that these branches keep, merged where their segments nest and they are not to be apart."""
        chains: list[list[_Kept]] = []
        outer = -1
        for one in sorted(kept, key=lambda one: -(self._length(one.branch) or math.inf)):
            length = self._length(one.branch)
            if outer == length or outer == 0 or (outer > 0 and length and outer % length == 0):
                chains[-1].append(one)
            else:
                chains.append([one])
            outer = length
        walks: list[Walk] = []
        for chain in chains:
            merged = None if self.apart else self._merged(chain)
            walks += map(self._plain, chain) if merged is None else merged
        return walks

    def _plain(self, kept: _Kept) -> Walk:
        """One branch by itself."""
        branch, offset, occurrence = kept
        own = self._own_mode()
        return Walk(self._length(branch), branch.stride, offset, own, weight=branch.weight, occurrence=occurrence)

    def _row_by_row(self, kept: _Kept) -> Walk:
        """A branch that the groups do not go by; its classes count from the start of each segment."""
        rate, length = kept.branch.stride, self._length(kept.branch) or 1 << (self.span - 1).bit_length()
        return attrs.evolve(self._plain(kept), segment=length, row_rate=rate)

    def _length(self, branch: Branch) -> int:
        """Its segment length, 0 where all positions lie in one segment."""
        length = branch.segment_length
        return 0 if length is None or 0 < self.span <= length else length

    def _own_mode(self) -> Mode:
        if not self.is_causal:
            return Mode.ALL
        return Mode.FROM_ROW if self.transposed else Mode.UP_TO_ROW

    def _merged(self, kept: list[_Kept]) -> list[Walk] | None:
        """Each column once: those of the innermost segment, then of each segment around it.

        None for a single branch, and where a progression would be too short.
        """
        lengths = sorted({self._length(one.branch) for one in kept}, key=lambda w: w or math.inf)
        if len(kept) < 2:
            return None
        walks: list[Walk] = []
        for level, length in enumerate(lengths):
            counted = [one for one in kept if self._length(one.branch) in lengths[level:]]
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


def _columns(walk: Walk, reach: float, whole: int) -> float:
    """About those that a tile meets whose rows lie within `reach` positions, of `whole` where all are one segment."""
    length = walk.segment or whole
    within = min(reach, length)
    rows = {Mode.ALL: 2 * length, Mode.UP_TO_ROW: length + within, Mode.FROM_ROW: length + within}
    met = rows.get(walk.mode, length - walk.inner + max(0, within - walk.inner)) / 2
    return max(1.0, reach / length) * _COLUMNS * math.ceil(met / walk.stride / _COLUMNS)


def _progressions(counted: list[_Kept]) -> Iterator[tuple[int, int, int]]:
    """Stride, residue and multiplicity of progressions that hold every counted position once."""
    period = math.lcm(*(one.branch.stride for one in counted))
    weights = [sum(b.weight for b, o, _ in counted if (x - o) % b.stride == 0) for x in range(period)]

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
