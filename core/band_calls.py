"""From a sum of bands to calls of a dense kernel: rectangles, causal squares and windows (`DensePiece.window`).

Kernels that have no windows get squares in their place (`band_squares`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import attrs

from .band_squares import square_calls
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
        windows: calls may have a `window`; else squares take its place.
    """
    branches, bands = branches_and_bands(pattern, geometry)
    calls = None if bands is None else band_calls(bands, geometry, windows=windows)
    if bands is None or calls is None:
        return None
    strided = schedule(branches, geometry)
    return Dense(branches, bands, _with_bands(strided, calls, geometry) if calls else strided)


def branches_and_bands(pattern: Pattern, geometry: Geometry) -> tuple[tuple[Branch, ...], tuple[Band, ...] | None]:
    """The strided branches of a pattern and the bands of all else; None for those where it is no sum of bands."""
    branches, rest = split(pattern, geometry)
    return branches, () if rest is None else bands_of(rest)


def band_calls(bands: Iterable[Band], geometry: Geometry, *, windows: bool) -> tuple[Call, ...] | None:
    """The calls that together compute a sum of bands, some of which have a `window` if those are asked for.

    None where positions are such that some band is no sum of those; of squares each band is one.
    """
    calls: list[Call] = []
    for number, band in enumerate(bands, 1):
        here = band.within(geometry)
        if here is None:
            continue
        parts, name = here.parts() if windows else [here], f"band {number}"
        if parts is None:
            return None
        for part in parts:
            call = _call(part, geometry, name)
            calls += [call] if windows or call.window is None else square_calls(part, geometry, name)
    return tuple(calls)


def _call(part: Band, geometry: Geometry, name: str) -> Call:
    """The call for a part, counted from where the ends of its queries and keys meet, as `DensePiece.window` is."""
    (first, last), (low, high) = part.queries, part.keys
    queries, keys = last - first, high - low
    left, right = part.left + high - last, part.right + last - high
    is_all = left >= keys - 1 and right >= queries - 1
    is_causal = not is_all and queries == keys and left >= keys - 1 and right == 0
    return Call(
        query=Rows.of_all_heads(first - geometry.q_offset, queries, geometry.num_heads),
        key=Rows.of_all_heads(low - geometry.kv_offset, keys, geometry.num_kv_heads),
        segments=1,
        is_causal=is_causal,
        weight=1,
        name=name,
        window=None if is_all or is_causal else (min(left, keys), min(right, keys)),
    )


def _with_bands(branches: Schedule, calls: tuple[Call, ...], geometry: Geometry) -> Schedule:
    """The calls of branches and of bands, first those of one name that cover everything if no branch does."""
    covering: list[Call] = []
    if branches.cover == 0:
        groups = (list(group) for _, group in groupby(calls, key=lambda call: call.name))
        covering = next((group for group in groups if _cover(group, geometry)), [])
    if not covering:
        return Schedule((*branches.calls, *calls), branches.cover)
    whole = covering[0]
    every = (*covering, *branches.calls, *(call for call in calls if call.name != whole.name))
    return Schedule(every, len(covering), is_whole=len(every) == whole.segments == 1 and not whole.is_mirrored)


def _cover(calls: list[Call], geometry: Geometry) -> bool:
    """Whether every row of queries and of keys is in exactly one of the calls: a rectangle, or squares."""
    if len(calls) > 1 and not all(call.is_causal for call in calls):
        return False  # they may share rows
    queries = sum(call.segments * call.query.count for call in calls)
    keys = sum(call.segments * call.key.count for call in calls)
    return (queries, keys) == (geometry.q_len, geometry.kv_len)
