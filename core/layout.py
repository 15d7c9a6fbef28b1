"""Layouts: a pattern lowered for one geometry, as strided branches, as tables of blocks, or both.

Shapes: H query heads, T tables (heads that see the same share one), R block rows, E listed blocks, M distinct masks,
b block size. Block row i holds query indices i*b ... i*b + b - 1, block column j likewise the keys; both grids start
at index 0 of their tensor, whatever the offsets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np
from numpy.typing import NDArray

from .geometry import Geometry
from .pattern import Branch, Pattern

if TYPE_CHECKING:
    from .pattern import IntArray


@attrs.frozen(eq=False)
class BlockGrid:
    """Blocks of queries against blocks of keys.

    Attributes:
        block_size: queries and keys in a block; the last of each may be shorter.
        query_low: absolute position of each block row's first query, (rows,) int64.
        key_low: absolute position of each block column's first key, (cols,) int64.
    """

    block_size: int
    query_low: IntArray
    key_low: IntArray

    @classmethod
    def of(cls, geometry: Geometry, block_size: int) -> BlockGrid:
        """The grid over all queries and keys of `geometry`."""
        query = np.arange(0, geometry.q_len, block_size, dtype=np.int64) + geometry.q_offset
        key = np.arange(0, geometry.kv_len, block_size, dtype=np.int64) + geometry.kv_offset
        return cls(block_size, query, key)


@attrs.frozen(eq=False)
class BlockSupport:
    """Blocks of one head that hold pairs, sorted by row, then column, without repetition.

    Attributes:
        rows, cols: block indices, (E,) int64.
        multiplicity: (E,) int64, the constant multiplicity of every pair in the block; 0 where it is not constant and
            must be evaluated.
    """

    rows: IntArray
    cols: IntArray
    multiplicity: IntArray


@attrs.frozen(eq=False)
class BlockLayout:
    """Compressed rows of key blocks per table, with integer weights and token-exact masks.

    Attributes:
        geometry: what the layout was made for.
        block_size: b.
        head_table: (H,) int32, the table of each query head.
        row_ptr: (T, R + 1) int64; the blocks of row i of table t are entries row_ptr[t, i]:row_ptr[t, i + 1].
        cols: (E,) int32, key block indices, ascending within a row, none twice.
        weights: (E,) int32, multiplicity of a full block; 0 for a partial one.
        mask_ids: (E,) int32, the mask of a partial block; -1 for a full one.
        masks: (M, b, b) uint8, multiplicity per (query, key) of a block, causality and the tensors' ends included.
    """

    geometry: Geometry
    block_size: int
    head_table: NDArray[np.int32]
    row_ptr: NDArray[np.int64]
    cols: NDArray[np.int32]
    weights: NDArray[np.int32]
    mask_ids: NDArray[np.int32]
    masks: NDArray[np.uint8]


@attrs.frozen(eq=False)
class Layout:
    """A pattern lowered for one geometry: the sum of its strided branches and its table of blocks.

    Attributes:
        pattern: what was lowered.
        geometry: for which call.
        branches: strided parts; causality is that of the geometry.
        blocks: the rest, or None.
    """

    pattern: Pattern
    geometry: Geometry
    branches: tuple[Branch, ...]
    blocks: BlockLayout | None
