"""How many rows each rank names of each other, counted without listing them: for branches, whatever the length.

A branch names, before and after a shard, the positions of one residue in one interval: its segment's part there. The
union over a head group's branches is cut at all interval ends; inside each stretch a few residue classes remain, most
of them nested or disjoint, and inclusion and exclusion counts the rest. R ranks, K key-value heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING

import attrs
import numpy as np

from ..core.geometry import Geometry
from ..core.lowering import layout_kinds, lower
from ..core.pattern import Branch, Pattern
from .plan import received_rows
from .shards import Shards

if TYPE_CHECKING:
    from ..core.pattern import IntArray


@attrs.frozen(order=True)
class _Progression:
    """Positions of low:high that are congruent to `residue` modulo `stride`."""

    low: int
    high: int
    stride: int
    residue: int

    @property
    def first(self) -> int:
        """The smallest such position from `low` on."""
        return self.low + (self.residue - self.low) % self.stride

    def within(self, low: int, high: int) -> _Progression:
        """Those of another interval too."""
        return _Progression(max(low, self.low), min(high, self.high), self.stride, self.residue)

    @property
    def is_empty(self) -> bool:
        return self.first >= self.high


class RowCounter:
    """Counts, for one pattern and cut, the rows that ranks name of each other."""

    def __init__(self, pattern: Pattern, shards: Shards, *, limit_bytes: int | None = None) -> None:
        self.pattern = pattern
        self.shards = shards
        self.limit_bytes = limit_bytes
        self.branches: tuple[Branch, ...] | None = None
        heads = (shards.num_heads, shards.num_kv_heads, shards.is_causal)
        if layout_kinds(pattern, *heads) == {"branch"}:
            self.branches = lower(pattern, shards.geometry(0, 0, 0)).branches
            group = shards.group_size
            offsets = list(zip(*(branch.offsets for branch in self.branches), strict=True))
            kinds = [frozenset(offsets[head : head + group]) for head in range(0, shards.num_heads, group)]
            # Key-value heads whose queries use the same offsets name the same positions.
            self._kinds = [(sorted(kind, key=repr), kinds.count(kind)) for kind in dict.fromkeys(kinds)]

    def received(self, rank: int) -> IntArray:
        """Rows that the queries of `rank` name, by their owner, (R,) int64."""
        shards = self.shards
        if self.branches is None:
            codes = received_rows(self.pattern, shards, rank, limit_bytes=self.limit_bytes)
            return np.bincount(codes // (shards.length * shards.num_kv_heads), minlength=shards.size).astype(np.int64)
        total = np.zeros(shards.size, dtype=np.int64)
        for geometry in shards.remote(rank):
            for offsets, times in self._kinds:
                parts = {p for heads in offsets for p in self._progressions(heads, geometry)}
                total += times * _count(parts, shards)
        return total

    def _progressions(self, offsets: Sequence[int | None], geometry: Geometry) -> Iterator[_Progression]:
        """The remote keys that a head with these offsets names, branch by branch."""
        assert self.branches is not None
        q_low, q_high = geometry.q_offset, geometry.q_offset + geometry.q_len
        k_low, k_high = geometry.kv_offset, geometry.kv_offset + geometry.kv_len
        for branch, offset in zip(self.branches, offsets, strict=True):
            if offset is None:
                continue
            width, base, end = branch.segment_length, 0, self.shards.seq_len
            if width is not None:  # the one segment that holds positions on both sides of the shard's edge
                base = (q_low if k_low < q_low else q_high - 1) // width * width
                end = base + width
            low = base + offset if width is not None else 0
            whole = _Progression(low, end, branch.stride, (base + offset) % branch.stride)
            keys, queries = whole.within(k_low, k_high), whole.within(q_low, q_high)
            if not keys.is_empty and not queries.is_empty:
                yield keys


def largest_receive(pattern: Pattern, shards: Shards, *, limit_bytes: int | None = None) -> int:
    """The most rows that any rank receives in a forward pass.

    Raises:
        ConfigError: a table of blocks needs more than `limit_bytes`.
    """
    counter = RowCounter(pattern, shards, limit_bytes=limit_bytes)
    return max(int(counter.received(rank).sum()) for rank in range(shards.size))


def _count(parts: Iterable[_Progression], shards: Shards) -> IntArray:
    """Positions in any of `parts`, by the shard that they lie in, (R,) int64."""
    parts = sorted(parts)
    edges = sorted({edge for part in parts for edge in (part.low, part.high)})
    total = np.zeros(shards.size, dtype=np.int64)
    for low, high in pairwise(edges):
        classes = _maximal({(p.stride, p.residue) for p in parts if p.low <= low and high <= p.high})
        first, last = low // shards.length, (high - 1) // shards.length
        bounds = np.clip(np.arange(first, last + 2) * shards.length, low, high)
        for sign, stride, residue in _signed(classes):
            total[first : last + 1] += sign * np.diff(-((residue - bounds) // stride))
    return total


def _maximal(classes: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those residue classes (stride, residue) that lie in no other."""
    kept: list[tuple[int, int]] = []
    for stride, residue in sorted(classes):
        if not any(stride % other == 0 and residue % other == r for other, r in kept):
            kept.append((stride, residue))
    return kept


def _signed(classes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Signed residue classes (sign, stride, residue) whose sum counts the union of `classes`."""
    terms: list[tuple[int, int, int]] = []
    for stride, residue in classes:
        new = [(1, stride, residue)]
        for sign, other, r in terms:
            common = gcd(stride, other)
            if (residue - r) % common:
                continue
            # Chinese remainder: r + other * t is congruent to residue modulo stride.
            step = stride // common
            t = (residue - r) // common * pow(other // common, -1, step) % step if step > 1 else 0
            new.append((-sign, other * step, (r + other * t) % (other * step)))
        terms += new
    yield from terms
