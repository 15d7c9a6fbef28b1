"""From a sum of bands to calls of a dense kernel: rectangles, causal squares and windows (`DensePiece.window`)."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from .bands import Band, bands_of
from .geometry import Geometry
from .lowering import split
from .pattern import Branch, Pattern
from .schedule import Call, Rows, Schedule, schedule


@attrs.frozen
class Dense:
    """A pattern as calls of a dense kernel alone: its strided branches, and the bands that it has beside them.

    Attributes:
        branches: the strided parts.
        bands: the rest.
        schedule: the calls of both.
    """

    branches: tuple[Branch, ...]
    bands: tuple[Band, ...]
    schedule: Schedule


def dense_form(pattern: Pattern, geometry: Geometry, *, windows: bool) -> Dense | None:
    """The calls that compute a pattern; None where it takes a table of blocks.

    Args:
        pattern: what is to be computed.
        geometry: for which call.
        windows: calls may have a `window`.
    """
    branches, bands = branches_and_bands(pattern, geometry)
    calls = None if bands is None else band_calls(bands, geometry)
    if bands is None or calls is None or (not windows and any(call.window is not None for call in calls)):
        return None
    strided = schedule(branches, geometry)
    return Dense(branches, bands, _with_bands(strided, calls, geometry) if calls else strided)


def branches_and_bands(pattern: Pattern, geometry: Geometry) -> tuple[tuple[Branch, ...], tuple[Band, ...] | None]:
    """The strided branches of a pattern and the bands of all else; None for those where it is no sum of bands."""
    branches, rest = split(pattern, geometry)
    return branches, () if rest is None else bands_of(rest)


def band_calls(bands: Iterable[Band], geometry: Geometry) -> tuple[Call, ...] | None:
    """The calls that together compute a sum of bands; None where positions are such that some band is no sum of calls.

    Some have a `window`.
    """
    calls: list[Call] = []
    for number, band in enumerate(bands, 1):
        here = band.within(geometry)
        if here is None:
            continue
        parts = here.parts()
        if parts is None:
            return None
        calls += [_call(part, geometry, f"band {number}") for part in parts]
    return tuple(calls)


def _call(part: Band, geometry: Geometry, name: str) -> Call:
    """The call for a part, counted from where the ends of its queries and keys meet, as `DensePiece.window` is."""
    (first, last), (low, high) = part.queries, part.keys
    queries, keys = last - first, high - low
    left, right = part.left + high - last, part.right + last - high
    is_all = left >= keys - 1 and right >= queries - 1
    is_causal = not is_all and queries == keys and left >= keys - 1 and right == 0
    return Call(
        query=_rows(first - geometry.q_offset, queries, geometry.num_heads),
        key=_rows(low - geometry.kv_offset, keys, geometry.num_kv_heads),
        segments=1,
        is_causal=is_causal,
        weight=1,
        name=name,
        window=None if is_all or is_causal else (min(left, keys), min(right, keys)),
    )


def _rows(start: int, count: int, num_heads: int) -> Rows:
    return Rows(start, step=1, count=count, segment_step=0, head=0, head_step=1, head_shift=0, num_heads=num_heads)


def _with_bands(branches: Schedule, calls: tuple[Call, ...], geometry: Geometry) -> Schedule:
    """The calls of branches and of bands, first one band that covers everything if no branch does."""
    covering = [call for call in calls if _covers(call, geometry)] if branches.cover == 0 else []
    if not covering:
        return Schedule((*branches.calls, *calls), branches.cover)
    first = covering[0]
    every = (first, *branches.calls, *(call for call in calls if call is not first))
    return Schedule(every, 1, is_whole=len(every) == 1)


def _covers(call: Call, geometry: Geometry) -> bool:
    return (call.query.count, call.key.count) == (geometry.q_len, geometry.kv_len)
