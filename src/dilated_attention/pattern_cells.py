"""A pattern as cells of queries against keys: in each the exact number of its pairs that a head sees.

A cell is whole blocks of a table, so no block counts for two. Shapes: R rows of cells, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from .core.blocking import lower_blocks
from .core.geometry import Geometry
from .core.pattern import Pattern

Counts = NDArray[np.int64]


@attrs.frozen(kw_only=True, eq=False)
class Cells:
    """What one head sees of one sequence.

    Attributes:
        seen: (R, C) int64, pairs of queries (rows) and keys that count at least once.
        allowed: (R, C) int64, pairs that causality allows.
    """

    seen: Counts
    allowed: Counts

    @property
    def density(self) -> float:
        """Pairs seen as a share of those allowed."""
        return float(self.seen.sum() / self.allowed.sum())

    def shares(self) -> NDArray[np.float64]:
        """(R, C): seen over allowed, nan where causality allows nothing."""
        return np.where(self.allowed > 0, self.seen / np.maximum(self.allowed, 1), np.nan)

    def levels(self, steps: Sequence[float]) -> Counts:
        """(R, C): -1 where nothing is allowed, 0 for not seen; whatever is seen shows, one more from each step on."""
        levels = np.where(self.seen > 0, 1 + np.searchsorted(steps, self.shares()), 0)
        return np.where(self.allowed > 0, levels, -1)


def count_cells(
    pattern: Pattern,
    geometry: Geometry,
    head: int,
    *,
    rows: Counts,
    cols: Counts,
    block_size: int,
    limit_bytes: int,
) -> Cells:
    """Count the pairs of one sequence's cells, whose first queries are `rows` (R,) and first keys `cols` (C,).

    Both begin with 0 and are multiples of `block_size`.

    Raises:
        ConfigError: the table of blocks needs more than `limit_bytes`.
    """
    length = geometry.q_len
    table = lower_blocks(pattern, geometry, block_size=block_size, limit_bytes=limit_bytes)
    pointers = table.row_ptr[int(table.head_table[head])]
    entries = slice(int(pointers[0]), int(pointers[-1]))
    mask_ids, low = table.mask_ids[entries], np.arange(0, length, block_size, dtype=np.int64)
    q_block = np.repeat(np.arange(low.size), np.diff(pointers))
    pairs = np.minimum(length - low, block_size)[q_block] * block_size  # a block at the end of the keys has a mask
    if table.masks.size:
        pairs = np.where(mask_ids >= 0, np.count_nonzero(table.masks, axis=(1, 2))[mask_ids], pairs)
    row, col = (np.searchsorted(starts, low, side="right") - 1 for starts in (rows, cols))
    place = row[q_block] * cols.size + col[table.cols[entries]]
    seen = np.bincount(place, weights=pairs, minlength=rows.size * cols.size)
    return Cells(
        seen=seen.astype(np.int64).reshape(rows.size, cols.size),
        allowed=_allowed(np.append(rows, length), np.append(cols, length), is_causal=geometry.is_causal),
    )


def _allowed(q_edge: Counts, k_edge: Counts, *, is_causal: bool) -> Counts:
    """(R, C) pairs of the cells between edges (R + 1,) and (C + 1,) that causality allows."""
    p, q = q_edge[:, None], k_edge
    if is_causal:  # pairs 0 <= p' < p, 0 <= q' < q with q' <= p'
        q = np.minimum(p, q)
        below = q * (q + 1) // 2 + (p - q) * q
    else:
        below = p * q
    return np.diff(np.diff(below, axis=0), axis=1)
