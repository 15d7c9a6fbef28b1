"""From a band to causal squares: how kernels that have no windows compute it, at the cost of nearly only its pairs.

Where each query sees W + 1 keys, chunks of W + 1 queries see two triangles each (here W = 3):

    x x x o
      x x o o
        x o o o
          o o o o

That on the right is a causal square. That on the left is one once the rows of queries and keys are read backwards
(`Call.is_mirrored`). The triangles of all chunks stack over the batch. Where the band's rectangle cuts some, what is
left of them are smaller ones, and rectangles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .bands import Band
from .geometry import Geometry
from .schedule import MOST_STACKED, Call, Rows, Run, rectangles, stacked

_IntArray = NDArray[np.int64]
_Ranges = tuple[_IntArray, _IntArray]  # from, to

_MOST_LISTED: Final = 1 << 18  # chunks, beyond which those that nothing cuts are counted instead
_AT_AN_END: Final = 4  # chunks that the rectangle may cut; it is one at the first query, and three at the last


def square_calls(band: Band, geometry: Geometry, name: str) -> Iterator[Call]:
    """The calls that compute a band, trimmed as `Band.within` does it; no row is in two of the same name."""
    (first, last), (low, high) = band.queries, band.keys
    # As far as the rectangle reaches: a bound beyond that cuts nothing.
    left, right = min(band.left, last - low), min(band.right, high - first)
    width = left + right
    listed, inner = _chunks(first, last, width + 1)
    starts = np.concatenate([np.arange(part.start, part.stop, part.step, dtype=np.int64) for part in listed])
    for is_mirrored, side, shift in ((False, width + 1, right), (True, width, -left)):
        begins = starts + shift
        rows = np.zeros_like(starts), np.minimum(last - starts, side)
        cols = (low - begins).clip(0, side), (high - begins).clip(0, side)
        for number, (of_queries, of_keys, is_causal) in enumerate(_cut(rows, cols, side, is_mirrored)):
            queries, keys = of_queries[1] - of_queries[0], of_keys[1] - of_keys[0]
            query_start = starts + of_queries[0] - geometry.q_offset
            key_start = begins + of_keys[0] - geometry.kv_offset
            some = (queries > 0) & (keys > 0)
            kind = "squares" if is_causal else f"edge {number}"
            runs = stacked(query_start[some], queries[some], key_start[some], keys[some], is_causal)
            whole = _whole(inner, side, shift, geometry, is_causal) if number == 0 and side else ()
            for run in (*runs, *whole):
                yield Call(
                    query=Rows.of_all_heads(
                        run.query_start, run.queries, geometry.num_heads, segment_step=run.query_step
                    ),
                    key=Rows.of_all_heads(run.key_start, run.keys, geometry.num_kv_heads, segment_step=run.key_step),
                    segments=run.segments,
                    is_causal=is_causal,
                    weight=1,
                    name=f"{name} {'mirrored ' if is_mirrored else ''}{kind}",
                    is_mirrored=is_mirrored and is_causal,
                )


def _chunks(first: int, last: int, size: int) -> tuple[list[range], range]:
    """The first queries of all chunks: those to look at one by one, and between them those that are whole."""
    every = range(first, last, size)
    if len(every) <= _MOST_LISTED:
        return [every], every[:0]
    return [every[:_AT_AN_END], every[-_AT_AN_END:]], every[_AT_AN_END:-_AT_AN_END]


def _whole(starts: range, side: int, shift: int, geometry: Geometry, is_causal: bool) -> Iterator[Run]:
    """The squares of chunks that nothing cuts, as `stacked` joins them."""
    for place in range(0, len(starts), MOST_STACKED):
        part, step = starts[place : place + MOST_STACKED], starts.step
        query, key = part[0] - geometry.q_offset, part[0] + shift - geometry.kv_offset
        yield Run(query, side, step, key, side, step, len(part), is_causal)


def _cut(rows: _Ranges, cols: _Ranges, side: int, is_mirrored: bool) -> Iterator[tuple[_Ranges, _Ranges, bool]]:
    """What of each chunk's triangle lies in these rows and columns of it: triangles, as squares, and rectangles."""
    if not is_mirrored:
        for low_q, high_q, low_k, high_k, is_causal in rectangles(*rows, *cols, is_causal=True):
            yield (low_q, high_q), (low_k, high_k), is_causal
        return
    for queries, keys, is_causal in _cut(_backwards(rows, side), _backwards(cols, side), side, is_mirrored=False):
        yield _backwards(queries, side), _backwards(keys, side), is_causal


def _backwards(ranges: _Ranges, side: int) -> _Ranges:
    return side - ranges[1], side - ranges[0]
