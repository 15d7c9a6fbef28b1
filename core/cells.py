"""Sets of pairs of positions as branches make them, and how large a union of such sets is.

Pairs common to several branches lie in cells (the common refinement of the branches' segments) and have, in each cell,
one residue modulo the strides' least common multiple. So what several branches have in common is described like a
single one: cells, a stride and a residue per cell. The size of a union follows by inclusion and exclusion.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

from .geometry import Geometry
from .pattern import Branch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .pattern import IntArray

_STEP: Final = 1 << 10  # cells that take as long as what is done whatever their number is
_MOST_CELLS: Final = 1 << 24  # some tens of nanoseconds each


@attrs.frozen(eq=False)
class Cells:
    """Pairs of positions of one cell low:high that are both congruent to `residue` modulo `stride`; arrays (cells,)."""

    low: IntArray
    high: IntArray
    stride: int
    residue: IntArray

    def pairs(self, geometry: Geometry) -> int:
        """How many such pairs the geometry allows."""
        keys = geometry.kv_offset, geometry.kv_offset + geometry.kv_len
        queries = geometry.q_offset, geometry.q_offset + geometry.q_len
        return int(self.each(*queries, *keys, is_causal=geometry.is_causal).sum())

    def queries(self, geometry: Geometry) -> int:
        """How many queries are at such positions."""
        return int(self._places(geometry.q_offset, geometry.q_offset + geometry.q_len)[1].sum())

    def each(
        self,
        q_low: int | IntArray,
        q_high: int | IntArray,
        k_low: int | IntArray,
        k_high: int | IntArray,
        *,
        is_causal: bool,
    ) -> IntArray:
        """How many of each cell have their query in q_low:q_high and their key in k_low:k_high; bounds also by cell."""
        q_first, q_count = self._places(q_low, q_high)
        k_first, k_count = self._places(k_low, k_high)
        if not is_causal:
            return q_count * k_count
        # Query i of a cell sees key j where q_first + i >= k_first + j: min(max(lead + i, 0), k_count) keys.
        lead = q_first - k_first + 1
        return _ramp(lead + q_count, k_count) - _ramp(lead, k_count)

    def _places(self, low: int | IntArray, high: int | IntArray) -> tuple[IntArray, IntArray]:
        """The first place (position = residue + stride * place) from `low` on in each cell; how many before `high`."""
        low, high = np.maximum(self.low, low), np.minimum(self.high, high)
        first = -((self.residue - low) // self.stride)
        end = -((self.residue - high) // self.stride)
        return first, np.maximum(end - first, 0)


def _ramp(upper: IntArray, cap: IntArray) -> IntArray:
    """The sum of min(max(x, 0), cap) over all integers x < upper."""
    rising = np.clip(upper, 0, cap + 1)
    result: IntArray = rising * (rising - 1) // 2 + np.maximum(upper - cap - 1, 0) * cap
    return result


def cells_of(branch: Branch, offset: int, geometry: Geometry) -> Cells:
    """The positions of `branch` at `offset`: a cell for every segment that holds a query and a key."""
    w, r = branch.segment_length, branch.stride
    starts = {"query": geometry.q_offset, "key": geometry.kv_offset}
    ends = {"query": geometry.q_offset + geometry.q_len, "key": geometry.kv_offset + geometry.kv_len}
    if not geometry.q_len or not geometry.kv_len or (w is not None and offset >= w):
        none = np.zeros(0, dtype=np.int64)
        return Cells(none, none, r, none)
    if w is None:
        low, high = np.array([min(starts.values())]), np.array([max(ends.values())])
        return Cells(low, high, r, np.array([offset]))
    first, last = geometry.segments(w)
    low = np.arange(first, last + 1, dtype=np.int64) * w
    return Cells(low, low + w, r, (low + offset) % r)


@attrs.define
class Steps:
    """Cells that may still be compared: there may be two comparisons to the number of sets that do not nest."""

    left: int = _MOST_CELLS

    def take(self, *sets: Cells) -> bool:
        """Whether these may be compared."""
        self.left -= _STEP + sum(each.low.size for each in sets)
        return self.left >= 0


def union_size(families: list[list[Cells]], size: Callable[[Cells], int], steps: Steps) -> int | None:
    """Inclusion and exclusion over the sets, depth first, without the subtrees that cancel; None after too many steps.

    Sets of a family are disjoint, as branches of a length and a stride with different offsets are. Where the common
    pairs of a choice lie inside a set that is still to be decided, choices with and without that set cancel, so nested
    branches cost their square instead of two to their number.
    """
    families = sorted(families, key=lambda family: family[0].stride)
    total = 0
    # The farther family is joined first, so that those between, which often hold the common pairs, are still undecided.
    stack = [(cells, families[:index:-1], 1) for index, family in enumerate(families) for cells in family]
    while stack:
        common, undecided, sign = stack.pop()
        others = [other for family in undecided for other in family]
        if any(steps.take(common) and _within(common, other) for other in others):
            continue
        total += sign * size(common)
        for index, family in enumerate(undecided):
            for other in family:
                if not steps.take(common, other):
                    return None
                both = _intersection(common, other)
                if both.low.size:
                    stack.append((both, undecided[index + 1 :], -sign))
    return total


def _matching(cells: Cells, other: Cells) -> NDArray[np.int64]:
    """The cell of `other` that holds each cell's low position; -1 where none does."""
    index = np.searchsorted(other.low, cells.low, side="right") - 1
    if not other.low.size:
        return np.full(cells.low.shape, -1, dtype=np.int64)
    return np.where((index >= 0) & (cells.low < other.high[index]), index, -1)


def _within(cells: Cells, other: Cells) -> bool:
    """True where every pair of `cells` is one of `other`."""
    if cells.stride % other.stride:
        return False
    index = _matching(cells, other)
    if (index < 0).any():
        return False
    same = (cells.residue - other.residue[index]) % other.stride == 0
    return bool((same & (cells.high <= other.high[index])).all())


def _intersection(a: Cells, b: Cells) -> Cells:
    """The pairs that both have, cells in ascending order."""
    low = np.union1d(a.low, b.low)
    probe = Cells(low, low, 1, low)
    in_a, in_b = _matching(probe, a), _matching(probe, b)
    common = gcd(a.stride, b.stride)
    lcm = a.stride // common * b.stride
    kept = (in_a >= 0) & (in_b >= 0)
    low, in_a, in_b = low[kept], in_a[kept], in_b[kept]
    residue_a, residue_b = a.residue[in_a], b.residue[in_b]
    kept = (residue_a - residue_b) % common == 0
    low, in_a, in_b, residue_a, residue_b = (x[kept] for x in (low, in_a, in_b, residue_a, residue_b))
    # Chinese remainder: residue_a + a.stride * t is congruent to residue_b modulo b.stride.
    inverse = pow(a.stride // common, -1, b.stride // common) if b.stride != common else 0
    t = (residue_b - residue_a) // common * inverse % (b.stride // common)
    return Cells(low, np.minimum(a.high[in_a], b.high[in_b]), lcm, (residue_a + a.stride * t) % lcm)
