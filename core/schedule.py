"""From strided branches to calls of a dense kernel: which rows of which heads meet which keys, as plain strides.

Within one segment the kept positions of a head are j * stride + offset, so a branch of LongNet (arXiv 2307.02486) is
dense attention over a strided view. Segments of equal shape stack along the batch; heads whose offsets form an
arithmetic progression stack along the head dimension, because moving by one head then moves by a constant number of
elements. Nothing is gathered, padded or indexed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import attrs
import numpy as np
from numpy.typing import NDArray

from .geometry import Geometry
from .pattern import Branch

_IntArray = NDArray[np.int64]

MOST_STACKED: Final = 65_535  # segments of a launch: as many blocks CUDA has along the last dimension of a grid


def branch_name(segment_length: int | None, stride: int) -> str:
    """A branch as traces show it."""
    return f"branch w={'all' if segment_length is None else segment_length} r={stride}"


@attrs.frozen
class Rows:
    """A stack of strided row ranges of a (batch, seq, heads, head_dim) tensor.

    Element (segment s, row i, head t) is row start + s * segment_step + i * step + t * head_shift of head
    head + t * head_step.
    """

    start: int
    step: int
    count: int
    segment_step: int
    head: int
    head_step: int
    head_shift: int
    num_heads: int

    @classmethod
    def of_all_heads(cls, start: int, count: int, num_heads: int, *, segment_step: int = 0) -> Rows:
        """Rows that follow each other, the same of every head."""
        return cls(start, 1, count, segment_step, head=0, head_step=1, head_shift=0, num_heads=num_heads)


@attrs.frozen
class Call:
    """One call of a dense kernel: `segments` stacked rectangles of query and key rows; pairs count `weight` times.

    `name` is that of its branch or band, as traces show it; `window` is that of `DensePiece`. Where `is_mirrored`, rows
    of queries and of keys are read backwards: row i of a causal square then sees rows j >= i.
    """

    query: Rows
    key: Rows
    segments: int
    is_causal: bool
    weight: int
    name: str
    window: tuple[int, int] | None = None
    is_mirrored: bool = False

    @property
    def pairs(self) -> int:
        """Pairs that the call counts, over its segments and query heads, `weight` included."""
        rows, cols = self.query.count, self.key.count
        each = rows * cols
        if self.is_causal:
            each = rows * (rows + 1) // 2
        elif self.window is not None:
            each = _pairs_in_window(rows, cols, *self.window)
        return each * self.segments * self.query.num_heads * self.weight

    @property
    def distances(self) -> tuple[int, int]:
        """How far a key row is beyond a query row that it is a pair with: at least, and at most."""
        rows, cols = self.query.count, self.key.count
        if self.window is not None:
            return cols - rows - self.window[0], cols - rows + self.window[1]
        if self.is_mirrored:
            return 0, cols
        return -rows, 0 if self.is_causal else cols


def _pairs_in_window(rows: int, cols: int, left: int, right: int) -> int:
    """Pairs of a window over rows and columns whose ends meet: those outside are two triangles that are cut off."""
    before, after = max(0, cols - 1 - left), max(0, rows - 1 - right)  # of the last row, of the first
    skipped = max(0, before - rows)  # rows of the first triangle that lie before the first row
    lost = before * (before + 1) // 2 - skipped * (skipped + 1) // 2 + after * (after + 1) // 2
    return rows * cols - lost


@attrs.frozen
class Schedule:
    """All calls of a layout's branches, and of bands where there are some.

    Attributes:
        calls: in the order in which they run.
        cover: how many leading calls together touch every query row of every head exactly once and every key row of
            every key-value head exactly once; their results can be written instead of merged. 0 where none do.
        is_whole: the only call is dense attention of all queries to all keys; no view is needed for it.
        pairs: that all calls count. (Not a cached_property, which in attrs slows down every other attribute.)
    """

    calls: tuple[Call, ...]
    cover: int
    is_whole: bool = False
    pairs: int = attrs.field(init=False)

    @pairs.default
    def _count_pairs(self) -> int:
        return sum(call.pairs for call in self.calls)

    @property
    def nbytes(self) -> int:
        """A generous estimate of the memory that the calls occupy, for the cache."""
        return 1024 + 1024 * len(self.calls)


@attrs.frozen
class Run:
    """Equal rectangles in consecutive segments, for the offset that is subtracted from both starts."""

    query_start: int
    queries: int
    query_step: int
    key_start: int
    keys: int
    key_step: int
    segments: int
    is_causal: bool


@attrs.frozen
class _Heads:
    """Query heads in arithmetic progression, `group` of which in a row share a key-value head."""

    head: int
    head_step: int
    offset: int
    offset_step: int
    kv_head: int
    kv_step: int
    count: int
    group: int


def schedule(branches: Iterable[Branch], geometry: Geometry) -> Schedule:
    """The kernel calls that together compute `branches` for `geometry`, those of a covering branch first."""
    parts = [_branch_calls(branch, geometry) for branch in branches]
    covering = next((i for i, calls in enumerate(parts) if _covers(calls, geometry)), None)
    if covering is None:
        return Schedule(tuple(call for calls in parts for call in calls), 0)
    first = parts.pop(covering)
    calls = (*first, *(call for calls in parts for call in calls))
    return Schedule(calls, len(first), len(calls) == 1 and _is_whole(calls[0], geometry))


def _is_whole(call: Call, geometry: Geometry) -> bool:
    """True where the call takes all rows of all heads in their order, once."""
    query = Rows.of_all_heads(0, geometry.q_len, geometry.num_heads, segment_step=call.query.segment_step)
    key = Rows.of_all_heads(0, geometry.kv_len, geometry.num_kv_heads, segment_step=call.key.segment_step)
    return call.segments == 1 and call.weight == 1 and call.query == query and call.key == key


def _covers(calls: Sequence[Call], geometry: Geometry) -> bool:
    """True where every query row and every key row of every head is in exactly one of the calls of one branch."""
    aligned = geometry.q_offset == geometry.kv_offset and geometry.q_len == geometry.kv_len
    if geometry.is_causal and geometry.q_len > 1 and not aligned:
        return False  # a segment may then be cut into rectangles that share rows
    queries = sum(call.segments * call.query.count * call.query.num_heads for call in calls)
    keys = sum(call.segments * call.key.count * call.key.num_heads for call in calls)
    return queries == geometry.q_len * geometry.num_heads and keys == geometry.kv_len * geometry.num_kv_heads


def _branch_calls(branch: Branch, geometry: Geometry) -> list[Call]:
    by_profile: dict[tuple[Run, ...], list[tuple[int, int]]] = {}
    profiles: dict[int, tuple[Run, ...]] = {}
    for head, offset in enumerate(branch.offsets):
        if offset is None:
            continue
        if offset not in profiles:
            profiles[offset] = tuple(_runs(branch, offset, geometry))
        by_profile.setdefault(profiles[offset], []).append((head, offset))
    calls: list[Call] = []
    for runs, heads in by_profile.items():
        for bundle in _bundles(heads, geometry.group_size):
            calls.extend(_call(branch, run, bundle) for run in runs)
    return calls


def _call(branch: Branch, run: Run, heads: _Heads) -> Call:
    kv_count = heads.count // heads.group
    query = Rows(
        start=run.query_start + heads.offset,
        step=branch.stride,
        count=run.queries,
        segment_step=run.query_step,
        head=heads.head,
        head_step=heads.head_step,
        head_shift=heads.offset_step,
        num_heads=heads.count,
    )
    key = Rows(
        start=run.key_start + heads.offset,
        step=branch.stride,
        count=run.keys,
        segment_step=run.key_step,
        head=heads.kv_head,
        head_step=heads.kv_step,
        head_shift=heads.offset_step,
        num_heads=kv_count,
    )
    name = branch_name(branch.segment_length, branch.stride)
    return Call(query, key, run.segments, run.is_causal, branch.weight, name)


def _runs(branch: Branch, offset: int, geometry: Geometry) -> Iterator[Run]:
    """Rectangles of kept queries and keys of one offset, equal neighbours stacked; starts are less the offset."""
    if geometry.q_len == 0 or geometry.kv_len == 0:
        return
    width, stride = branch.segment_length, branch.stride
    q_end, kv_end = geometry.q_offset + geometry.q_len, geometry.kv_offset + geometry.kv_len
    if width is None:
        base = np.zeros(1, dtype=np.int64)
    else:
        first, last = geometry.segments(width)
        base = np.arange(first, last + 1, dtype=np.int64) * width

    def kept(low: int, high: int) -> tuple[_IntArray, _IntArray]:
        """Range of j whose positions base + offset + j * stride lie in low:high and in their segment."""
        start = -((base + offset - low) // stride)
        stop = -((base + offset - high) // stride)
        if width is None:
            return start, stop
        inside = -((offset - width) // stride)
        return np.maximum(start, 0), np.minimum(stop, inside)

    a, b = kept(geometry.q_offset, q_end)
    c, d = kept(geometry.kv_offset, kv_end)
    for low_q, high_q, low_k, high_k, is_causal in rectangles(a, b, c, d, is_causal=geometry.is_causal):
        keep = (high_q > low_q) & (high_k > low_k)
        query_start = (base + low_q * stride - geometry.q_offset)[keep]
        key_start = (base + low_k * stride - geometry.kv_offset)[keep]
        yield from stacked(query_start, (high_q - low_q)[keep], key_start, (high_k - low_k)[keep], is_causal)


def rectangles(
    a: _IntArray, b: _IntArray, c: _IntArray, d: _IntArray, *, is_causal: bool
) -> Iterator[tuple[_IntArray, _IntArray, _IntArray, _IntArray, bool]]:
    """Rows a:b against columns c:d, or under causality (column <= row) the rectangles and the square it consists of."""
    if not is_causal:
        yield a, b, c, d, False
        return
    if bool((b - a <= 1).all()):  # single rows, as in decoding: one rectangle each
        yield a, b, c, np.minimum(d, a + 1), False
        return
    low, high = np.maximum(a, c), np.minimum(b, d)
    yield low, high, low, high, True  # the square on the diagonal
    yield a, b, c, np.minimum(a, d), False  # keys before the first query: every query sees them
    after = np.maximum(a, d)  # queries at or past the last key see the keys that were not yet counted
    yield after, b, np.maximum(a, c), d, False


def stacked(
    query_start: _IntArray, queries: _IntArray, key_start: _IntArray, keys: _IntArray, is_causal: bool
) -> Iterator[Run]:
    """Join neighbouring segments of equal shape at equal distances, `MOST_STACKED` at most."""
    count = query_start.size
    if count < 2:  # short documents have no more: nothing to compare
        if count:
            yield Run(int(query_start[0]), int(queries[0]), 0, int(key_start[0]), int(keys[0]), 0, 1, is_causal)
        return
    i = 0
    shape = np.stack([queries, keys], axis=-1)
    step = np.stack([np.diff(query_start), np.diff(key_start)], axis=-1)
    # A run goes on while the shape stays and the distance is that of its first pair.
    same_shape = (shape[1:] == shape[:-1]).all(axis=-1)
    same_step = (step[1:] == step[:-1]).all(axis=-1)
    while i < count:
        j = i + 1
        if j < count and same_shape[i]:
            stops = np.flatnonzero(~(same_shape[j:] & same_step[i:]))
            j = count if stops.size == 0 else j + int(stops[0]) + 1
            j = min(j, i + MOST_STACKED)
        q_step, k_step = (int(step[i, 0]), int(step[i, 1])) if j > i + 1 else (0, 0)
        yield Run(
            int(query_start[i]), int(queries[i]), q_step, int(key_start[i]), int(keys[i]), k_step, j - i, is_causal
        )
        i = j


def _bundles(heads: Sequence[tuple[int, int]], group_size: int) -> Iterator[_Heads]:
    """Split (head, offset) pairs into few arithmetic progressions, the longest found first."""
    left = dict(heads)
    while left:
        first = min(left)
        best = _Heads(first, 1, left[first], 0, first // group_size, 1, 1, 1)
        for second in left:
            if second > first:
                best = max(best, _grow(left, first, second - first, group_size), key=lambda heads: heads.count)
        yield best
        for t in range(best.count):
            del left[best.head + t * best.head_step]


def _grow(left: dict[int, int], first: int, step: int, group_size: int) -> _Heads:
    """The longest progression from `first` by `step`: each head its own key-value head, or equal groups of them.

    Heads that share a key-value head must also share the offset (they then read the same keys); a stride of 0 over
    shared keys is never used, since a backward could not add into it.
    """
    chain = [first]
    while chain[-1] + step in left:
        chain.append(chain[-1] + step)
    kv = [head // group_size for head in chain]
    offsets = [left[head] for head in chain]
    group = 1
    while group < len(chain) and kv[group] == kv[0]:
        group += 1
    kv_step = kv[group] - kv[0] if group < len(chain) else 1
    # A falling offset may need a negative stride, which PyTorch has not; those heads do not go together.
    offset_step = max(0, offsets[1] - offsets[0]) if group == 1 and len(chain) > 1 else 0
    count = 0
    while count < len(chain) and kv[count] == kv[0] + count // group * kv_step:
        if offsets[count] != offsets[0] + count * offset_step:
            break
        count += 1
    if count < group:
        group, count, kv_step = count, count, 1
    count -= count % group
    return _Heads(first, step, offsets[0], offset_step, kv[0], kv_step, count, group)
