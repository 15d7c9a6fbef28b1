"""How many rows each rank names of each other, counted without listing them: for branches, whatever the length.

The union of a head group's progressions is cut at all interval ends; inside each stretch a few residue classes remain,
most of them nested or disjoint, and inclusion and exclusion counts the rest. R ranks, K key-value heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING

import attrs
import numpy as np

from ..core.pattern import Pattern
from .plan import received_rows, rows_of
from .progressions import BranchRows, Progression
from .shards import Shards

if TYPE_CHECKING:
    from ..core.pattern import IntArray


class RowCounter:
    """Counts, for one pattern and cut, the rows that ranks name of each other."""

    def __init__(self, pattern: Pattern, shards: Shards, *, limit_bytes: int | None = None) -> None:
        self.pattern = pattern
        self.shards = shards
        self.limit_bytes = limit_bytes
        self.branches = BranchRows.of(pattern, shards)
        if self.branches is not None:
            # Key-value heads whose queries use the same offsets name the same positions.
            heads = self.branches.heads
            self._kinds = [(sorted(kind, key=repr), heads.count(kind)) for kind in dict.fromkeys(heads)]

    def received(self, rank: int) -> IntArray:
        """Rows that the queries of `rank` name, by their owner, (R,) int64."""
        shards = self.shards
        if self.branches is None:
            codes = received_rows(self.pattern, shards, rank, limit_bytes=self.limit_bytes)
            return np.bincount(codes // (shards.length * shards.num_kv_heads), minlength=shards.size).astype(np.int64)
        total = np.zeros(shards.size, dtype=np.int64)
        for geometry in shards.remote(rank):
            low, high = geometry.kv_offset, geometry.kv_offset + geometry.kv_len
            for offsets, times in self._kinds:
                parts = {p for heads in offsets for p in self.branches.progressions(rank, heads, low, high)}
                total += times * _count(parts, shards)
        return total


@attrs.frozen(eq=False)
class Survey:
    """What a rank must know of all others to plan its own part.

    Attributes:
        most: the most rows that any rank receives in a forward pass.
        sent: of each rank, the own rows that it names (`RankPlan.sent`), where others' tables were lowered; else None.
    """

    most: int
    sent: tuple[IntArray, ...] | None


def most_rows(pattern: Pattern, shards: Shards) -> int:
    """A number of rows that no rank receives more of in a forward pass, found without looking at any rank."""
    everything = (shards.size - 1) * shards.length * shards.num_kv_heads
    branches = BranchRows.of(pattern, shards)
    return everything if branches is None else min(everything, branches.most)


def survey(pattern: Pattern, shards: Shards, rank: int, *, limit_bytes: int | None = None) -> Survey:
    """See `Survey`. Branches are counted; for blocks every rank's table is lowered, once.

    Raises:
        ConfigError: a table of blocks needs more than `limit_bytes`.
    """
    ranks, counter = range(shards.size), RowCounter(pattern, shards, limit_bytes=limit_bytes)
    if counter.branches is not None:
        return Survey(max(int(counter.received(to).sum()) for to in ranks), None)
    most, sent = 0, []
    for to in ranks:
        codes = received_rows(pattern, shards, to, limit_bytes=limit_bytes)
        most = max(most, codes.size)
        sent.append(rows_of(codes, shards, rank))
    return Survey(most, tuple(sent))


def _count(parts: Iterable[Progression], shards: Shards) -> IntArray:
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
