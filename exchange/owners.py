"""Rows by the shard that they lie in, added up from intervals of positions: what each rank sends.

Nothing is listed: an interval adds to the shards of its two ends, and those between are told by where it begins and
ends. R ranks, n intervals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs
import numpy as np

from ..core.supports import ranges

if TYPE_CHECKING:
    from ..core.pattern import IntArray

_SHARDS_AT_ONCE: Final = 1 << 22  # 32 MiB an array


def positions(low: IntArray, high: IntArray, stride: int, residue: IntArray) -> IntArray:
    """How many positions of each low:high are congruent to `residue` modulo `stride`; broadcastable, int64."""
    count = (residue - low) // stride - (residue - high) // stride
    return count.astype(np.int64, copy=False)


@attrs.define(eq=False)
class Owners:
    """Rows of each shard.

    Attributes:
        length: positions in a shard.
        size: R.
    """

    length: int
    size: int
    _rows: IntArray = attrs.field(init=False)
    _steps: IntArray = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._rows = np.zeros(self.size, dtype=np.int64)
        self._steps = np.zeros(self.size + 1, dtype=np.int64)  # from each shard to the next

    @property
    def rows(self) -> IntArray:
        """The sum so far, (R,) int64."""
        total: IntArray = self._rows + np.cumsum(self._steps[:-1])
        return total

    def add(self, low: IntArray, high: IntArray, stride: int, residue: IntArray, times: int | IntArray) -> None:
        """Add `times` the positions of each low:high, (n,), that are congruent to `residue` modulo `stride`."""
        kept = low < high
        low, high, residue, times = (x[kept] for x in np.broadcast_arrays(low, high, residue, times))
        first, last = low // self.length, (high - 1) // self.length
        ends = np.minimum((first + 1) * self.length, high)
        np.add.at(self._rows, first, times * positions(low, ends, stride, residue))
        wide = np.flatnonzero(last > first)
        first, last, residue, times = first[wide], last[wide], residue[wide], times[wide]
        np.add.at(self._rows, last, times * positions(last * self.length, high[wide], stride, residue))
        if self.length % stride == 0:  # the same number of every shard
            each = times * (self.length // stride)
            np.add.at(self._steps, first + 1, each)
            np.subtract.at(self._steps, last, each)
        else:
            self._add_whole(first + 1, last, stride, residue, times)

    def add_moved(self, rows: IntArray, shifts: IntArray) -> None:
        """Add `rows` (R,) moved on by each of `shifts`, (n,) int64, none twice; no row may leave the ranks."""
        steps = np.diff(rows, prepend=0, append=0)
        for place in np.flatnonzero(steps):
            self._steps[place + shifts] += steps[place]

    def _add_whole(self, first: IntArray, stop: IntArray, stride: int, residue: IntArray, times: IntArray) -> None:
        """`add` for the shards first:stop of each interval: all intervals of one residue at once."""
        kept = first < stop
        first, stop, residue, times = first[kept], stop[kept], residue[kept], times[kept]
        residues, kind = np.unique(residue, return_inverse=True)
        line = kind * (self.size + 1)  # shards of one residue after another
        edges, place = np.unique(np.concatenate([line + first, line + stop]), return_inverse=True)
        steps = np.zeros(edges.size, dtype=np.int64)
        np.add.at(steps, place, np.concatenate([times, -times]))
        covered = np.cumsum(steps)
        runs = np.flatnonzero(covered[:-1])
        lengths = np.diff(edges)[runs]
        cuts = np.searchsorted(np.cumsum(lengths), np.arange(_SHARDS_AT_ONCE, lengths.sum(), _SHARDS_AT_ONCE))
        for some in np.split(np.arange(runs.size), np.unique(cuts)):
            kinds, owner = np.divmod(ranges(edges[runs[some]], lengths[some]), self.size + 1)
            low = owner * self.length
            each = positions(low, low + self.length, stride, residues[kinds])
            np.add.at(self._rows, owner, np.repeat(covered[runs[some]], lengths[some]) * each)
