"""Patterns whose pairs lie in bands: sliding windows, and tokens that everyone sees.

A band holds the pairs of a rectangle of positions whose distance lies between two bounds. Dense kernels compute one at
the speed of its pairs (see `band_calls`), so that a sum of bands needs no table of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import attrs

from .geometry import Geometry
from .pattern import Pattern, Sum, Union

ANYWHERE: Final = 1 << 50  # beyond all positions and distances
_EVERYWHERE: Final = (-ANYWHERE, ANYWHERE)


@attrs.frozen
class Band:
    """The pairs of queries at positions `queries` and keys at `keys` with query - left <= key <= query + right.

    Both ranges are half-open. A bound may be negative: then the query's own position is not in the band.
    """

    left: int = ANYWHERE
    right: int = ANYWHERE
    queries: tuple[int, int] = _EVERYWHERE
    keys: tuple[int, int] = _EVERYWHERE

    @property
    def is_window(self) -> bool:
        """It is cut by nothing but its bounds."""
        return self.queries == self.keys == _EVERYWHERE

    def within(self, geometry: Geometry) -> Band | None:
        """Those of a call's queries and keys that have a pair, one that causality allows; None if none has."""
        right = min(self.right, 0) if geometry.is_causal else self.right
        first, last = self._of_call(self.queries, geometry.q_offset, geometry.q_len)
        low, high = self._of_call(self.keys, geometry.kv_offset, geometry.kv_len)
        return Band(self.left, right, (first, last), (low, high))._trimmed()

    @staticmethod
    def _of_call(positions: tuple[int, int], offset: int, length: int) -> tuple[int, int]:
        return max(positions[0], offset), min(positions[1], offset + length)

    def _trimmed(self) -> Band | None:
        """With no query and no key that has no pair."""
        (first, last), (low, high) = self.queries, self.keys
        if first >= last or low >= high or self.left + self.right < 0:
            return None
        first, last = max(first, low - self.right), min(last, high + self.left)
        if first >= last:
            return None
        low, high = max(low, first - self.left), min(high, last + self.right)
        return Band(self.left, self.right, (first, last), (low, high))

    def parts(self) -> list[Band] | None:
        """The band, trimmed as it is, as rectangles and bands of no more queries than keys; None if it is none."""
        (first, last), (low, high) = self.queries, self.keys
        if last - first <= high - low:
            return [self]
        begin, end = max(first, high - 1 - self.right), min(last, low + self.left + 1)  # these queries see all keys
        if begin >= end:
            return None
        ranges = (first, begin), (begin, end), (end, last)
        found = [attrs.evolve(self, queries=queries)._trimmed() for queries in ranges]
        return [part for part in found if part is not None]

    def __contains__(self, other: Band) -> bool:
        """Whether another window's pairs are among this one's."""
        return other.left <= self.left and other.right <= self.right

    def less(self, window: Band) -> list[Band]:
        """What of it lies to the left and to the right of a window, if anything does."""
        before = attrs.evolve(self, right=min(self.right, -window.left - 1))
        after = attrs.evolve(self, left=min(self.left, -window.right - 1))
        return [part for part in (before, after) if part.left + part.right >= 0]


def only_window(bands: Sequence[Band]) -> Band | None:
    """The window that is all there is, if one is."""
    return bands[0] if len(bands) == 1 and bands[0].is_window else None


def bands_of(pattern: Pattern) -> tuple[Band, ...] | None:
    """The bands whose sum the pattern is, before causality; None where it is no such sum.

    A class says so for itself alone: one that is derived from it may count other pairs.
    """
    named = pattern.unwrap()
    if not isinstance(named, Sum | Union):
        return named.bands() if "bands" in vars(type(named)) else None
    members = [bands_of(member) for member in named.of]
    known = [bands for bands in members if bands is not None]
    if len(known) < len(members):
        return None
    if isinstance(named, Sum):
        return tuple(band for bands in known for band in bands)
    if len(set(known)) == 1:
        return known[0]  # the union of one is that one, however often it counts a pair
    return _united(known) if named.max_multiplicity == 1 else None


def _united(members: Sequence[tuple[Band, ...]]) -> tuple[Band, ...] | None:
    """The union of windows and at most one other member, none of which counts a pair twice; None of others.

    Each is what it is where the windows before it are not, and the other comes last.
    """
    distinct = list(dict.fromkeys(members))
    alone = [window for bands in distinct if (window := only_window(bands)) is not None]
    windows = [window for window in alone if not any(window != other and window in other for other in alone)]
    others = [bands for bands in distinct if only_window(bands) is None]
    if len(others) > 1:
        return None
    found: list[Band] = []
    for number, bands in enumerate([*((window,) for window in windows), *others]):
        parts = list(bands)
        for window in windows[:number]:
            parts = [part for band in parts for part in band.less(window)]
        found += parts
    return tuple(found)
