"""How good a pattern is at a length: density, rows without keys, fan-in and fan-out, receptive field, load balance.

Everything is read off the pattern's table of blocks, so it costs what the pattern keeps. Shapes: T tables, E listed
blocks, b block size, R block rows, S queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np

from .core.blocking import lower_blocks
from .core.checks import require_int
from .core.counting import allowed_pairs, entry_rows
from .core.errors import ConfigError
from .core.geometry import Geometry
from .core.layout import BlockLayout
from .core.pattern import Pattern

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .core.pattern import IntArray

_BYTES_AT_ONCE = 64 << 20
_ONES = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


@attrs.frozen
class Spread:
    """How a count is spread over rows or columns, all heads together.

    Attributes:
        least: the smallest count.
        mean: the mean count.
        most: the largest count.
        histogram: histogram[k] positions have a count of k binary digits: none, 1, 2-3, 4-7, 8-15, ...
    """

    least: int
    mean: float
    most: int
    histogram: tuple[int, ...]


@attrs.frozen
class Quality:
    """What `measure` found; pairs are counted as often as the pattern counts them unless they are called distinct.

    Attributes:
        density: distinct pairs as a fraction of those that causality allows.
        empty_rows: queries without any key, over all heads.
        fan_out: keys counted by a query.
        fan_in: queries that count a key.
        receptive_field: after 1, 2, ... layers, the mean fraction of the blocks allowed by causality from which
            information reaches a query block, heads joined; a block that holds one pair counts as reached.
        layers_to_full: layers until every block is reached; None where those of receptive_field are not enough.
        load_imbalance: the dearest (head, block row) against the mean one; 1 is perfect balance.
        idle_tiles: fraction of (head, block row) without any work.
    """

    density: float
    empty_rows: int
    fan_out: Spread
    fan_in: Spread
    receptive_field: tuple[float, ...]
    layers_to_full: int | None
    load_imbalance: float
    idle_tiles: float


def measure(
    pattern: Pattern,
    geometry: Geometry,
    *,
    layers: int = 4,
    block_size: int | None = None,
    limit_bytes: int | None = None,
) -> Quality:
    """Measure `pattern` on one whole sequence.

    Args:
        pattern: what to judge.
        geometry: a self-attention of at least one token: equal lengths and offsets.
        layers: how many stacked layers the receptive field is followed through.
        block_size: of the table and of the receptive field; by default the pattern's own, else 128.
        limit_bytes: most bytes that the table may take.

    Raises:
        ConfigError: another geometry, or a table beyond the limit.
    """
    require_int("layers", layers, minimum=1)
    if geometry.q_len != geometry.kv_len or geometry.q_offset != geometry.kv_offset or not geometry.q_len:
        raise ConfigError(f"quality is measured on one whole sequence of at least one token, got {geometry}")
    blocks = lower_blocks(pattern, geometry, block_size=block_size, limit_bytes=limit_bytes)
    heads = np.bincount(blocks.head_table, minlength=blocks.row_ptr.shape[0])
    counts = [_fans(blocks, table) for table in range(heads.size)]
    fan_out, fan_in = (_spread([count[side] for count in counts], heads) for side in (0, 1))
    starts = np.arange(0, geometry.q_len, blocks.block_size)
    work = np.stack([np.add.reduceat(out, starts) for out, _ in counts])
    mean = float((work.mean(axis=1) * heads).sum() / heads.sum())
    field = _receptive_field(blocks, layers)
    return Quality(
        density=blocks.distinct_pairs / allowed_pairs(geometry),
        empty_rows=fan_out.histogram[0],
        fan_out=fan_out,
        fan_in=fan_in,
        receptive_field=field,
        layers_to_full=next((layer for layer, part in enumerate(field, 1) if part == 1.0), None),
        load_imbalance=float(work.max()) / mean if mean else 1.0,
        idle_tiles=float(((work == 0).mean(axis=1) * heads).sum() / heads.sum()),
    )


def _spread(counts: list[IntArray], heads: IntArray) -> Spread:
    """Over all heads, from the counts of each table and how many heads share it."""
    digits = [np.bincount(np.frexp(count.astype(np.float64))[1]) for count in counts]
    histogram = np.zeros(max(d.size for d in digits), dtype=np.int64)
    for found, times in zip(digits, heads, strict=True):
        histogram[: found.size] += found * times
    total = sum(int(count.sum()) * int(times) for count, times in zip(counts, heads, strict=True))
    return Spread(
        least=min(int(count.min()) for count in counts),
        mean=total / int(histogram.sum()),
        most=max(int(count.max()) for count in counts),
        histogram=tuple(int(n) for n in histogram),
    )


def _fans(blocks: BlockLayout, table: int) -> tuple[IntArray, IntArray]:
    """Keys counted by each query, and queries counting each key, of one table: (S,) each."""
    pointers, length, size = blocks.row_ptr[table], blocks.geometry.q_len, blocks.block_size
    entries = slice(int(pointers[0]), int(pointers[-1]))
    rows = np.repeat(np.arange(pointers.size - 1, dtype=np.int64), np.diff(pointers))
    cols, weights = blocks.cols[entries].astype(np.int64), blocks.weights[entries].astype(np.int64)
    queries = np.minimum(length - rows * size, size)
    fans = []
    for own, axis, per_line in ((rows, 2, weights * size), (cols, 1, weights * queries)):
        fan = np.zeros((pointers.size - 1, size), dtype=np.int64)
        # Sums of weights are far below 2**53, where float64 is exact.
        fan += np.bincount(own, weights=per_line, minlength=fan.shape[0]).astype(np.int64)[:, None]
        _add_masks(fan, own, blocks.mask_ids[entries], blocks.masks.sum(axis=axis, dtype=np.int64))
        fans.append(fan.ravel()[:length])
    return fans[0], fans[1]


def _add_masks(fan: IntArray, lines: IntArray, mask_ids: NDArray[np.int32], sums: IntArray) -> None:
    """Add to fan[line] the sums (M, b) of every mask that an entry of that line has."""
    partial = mask_ids >= 0
    if not partial.any():
        return
    keys, times = np.unique(lines[partial] * sums.shape[0] + mask_ids[partial], return_counts=True)
    line, mask = np.divmod(keys, sums.shape[0])
    step = max(1, _BYTES_AT_ONCE // (8 * sums.shape[1]))
    for begin in range(0, keys.size, step):
        chunk = slice(begin, begin + step)
        starts = np.flatnonzero(np.diff(line[chunk], prepend=-1))
        fan[line[chunk][starts]] += np.add.reduceat(sums[mask[chunk]] * times[chunk, None], starts, axis=0)


def _receptive_field(blocks: BlockLayout, layers: int) -> tuple[float, ...]:
    """Powers of the block graph of all heads together, as bits: row i of `reached` has a bit for every block.

    A residual connection carries a block's own content along, so each block reaches itself.
    """
    count = blocks.row_ptr.shape[1] - 1
    own = np.arange(count, dtype=np.int64)
    edges = np.unique(np.concatenate([entry_rows(blocks) * count + blocks.cols, own * (count + 1)]))
    rows, cols = np.divmod(edges, count)
    starts = np.searchsorted(rows, np.arange(count + 1))
    allowed = count * (count + 1) // 2 if blocks.geometry.is_causal else count**2
    bits = np.left_shift(np.uint8(1), (own % 8).astype(np.uint8))
    reached = np.zeros((count, -(-count // 8)), dtype=np.uint8)
    reached[own, own // 8] = bits
    field = []
    for _ in range(layers):
        reached = _step(reached, cols, starts)
        field.append(int(_ONES[reached].sum(dtype=np.int64)) / allowed)
    return tuple(field)


def _step(reached: NDArray[np.uint8], cols: IntArray, starts: IntArray) -> NDArray[np.uint8]:
    """One more layer: row i becomes the union of the rows of its neighbours cols[starts[i]:starts[i + 1]]."""
    further = np.empty_like(reached)
    begin = 0
    while begin < reached.shape[0]:
        room = starts[begin] + max(1, _BYTES_AT_ONCE // reached.shape[1])
        end = max(begin + 1, int(np.searchsorted(starts, room, side="right")) - 1)
        neighbours = reached[cols[starts[begin] : starts[end]]]
        further[begin:end] = np.bitwise_or.reduceat(neighbours, starts[begin:end] - starts[begin], axis=0)
        begin = end
    return further
