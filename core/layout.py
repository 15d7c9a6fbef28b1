"""Layouts: a pattern lowered for one geometry, as strided branches, as tables of blocks, or both.

Shapes: H query heads, T tables (heads that see the same share one), R block rows, E listed blocks, M distinct masks,
b block size. Block row i holds query indices i*b ... i*b + b - 1, block column j likewise the keys; both grids start
at index 0 of their tensor, whatever the offsets.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING

import attrs
import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError
from .geometry import Geometry
from .pattern import Branch, Pattern

ENTRY_BYTES = 12  # cols, weights and mask_ids of one listed block

if TYPE_CHECKING:
    from .pattern import IntArray


@attrs.frozen(eq=False)
class BlockGrid:
    """Blocks of queries against blocks of keys.

    Attributes:
        block_size: queries and keys in a block; the last of each may be shorter.
        query_low: absolute position of each block row's first query, (rows,) int64.
        key_low: absolute position of each block column's first key, (cols,) int64.
        limit_bytes: most that the blocks of a support over this grid may take, `ENTRY_BYTES` each, or None. Whoever
            lists more raises `ConfigError` through `check_blocks` before allocating them.
        tables: supports that will be made over it, one for each group of heads.
    """

    block_size: int
    query_low: IntArray
    key_low: IntArray
    limit_bytes: int | None = None
    tables: int = 1

    @classmethod
    def of(cls, geometry: Geometry, block_size: int, limit_bytes: int | None = None, *, tables: int = 1) -> BlockGrid:
        """The grid over all queries and keys of `geometry`.

        Raises:
            ConfigError: the first positions of its rows or columns alone take more than `limit_bytes`.
        """
        for what, length in (("queries", geometry.q_len), ("keys", geometry.kv_len)):
            nbytes = -(-length // block_size) * 8
            if limit_bytes is not None and nbytes > limit_bytes:
                raise ConfigError(
                    f"the block layout of {length:,} {what} needs more than {nbytes:,} bytes in blocks of {block_size}"
                    f", allowed are {limit_bytes:,}; raise Limits.layout_bytes or block_size"
                )
        query = np.arange(0, geometry.q_len, block_size, dtype=np.int64) + geometry.q_offset
        key = np.arange(0, geometry.kv_len, block_size, dtype=np.int64) + geometry.kv_offset
        return cls(block_size, query, key, limit_bytes, tables)

    def check_blocks(self, count: int) -> None:
        """Raise `ConfigError` when `count` blocks are more than a support may list."""
        if self.limit_bytes is not None and count * ENTRY_BYTES > self.limit_bytes:
            raise ConfigError(
                f"the block layout needs {count * ENTRY_BYTES:,} bytes for {count:,} blocks of {self.block_size}, "
                f"allowed are {self.limit_bytes:,}; raise Limits.layout_bytes or block_size"
            )


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

    @property
    def nbytes(self) -> int:
        """Bytes of all tables and masks."""
        return sum(array.nbytes for array in self._arrays())

    @cached_property
    def digest(self) -> str:
        """SHA-256 over geometry, block size, tables and masks, in hexadecimal."""
        sha = hashlib.sha256(repr((self.geometry.identity, self.block_size)).encode())
        for array in self._arrays():
            sha.update(repr((array.dtype.str, array.shape)).encode())
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()

    @cached_property
    def pairs(self) -> int:
        """Counted (query, key) pairs over all query heads, each as often as it counts."""
        from .counting import block_pairs

        return block_pairs(self, distinct=False)

    @cached_property
    def distinct_pairs(self) -> int:
        """(query, key) pairs over all query heads that count at least once."""
        from .counting import block_pairs

        return block_pairs(self, distinct=True)

    def _arrays(self) -> tuple[NDArray[np.generic], ...]:
        return (self.head_table, self.row_ptr, self.cols, self.weights, self.mask_ids, self.masks)


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

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of parts it has: "branch", "block"."""
        parts = (("branch", bool(self.branches)), ("block", self.blocks is not None))
        return frozenset(kind for kind, present in parts if present)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables, and of the branches' own few numbers (so that no layout is free to keep)."""
        branches = sum(8 * (3 + len(branch.offsets)) for branch in self.branches)
        return 64 + branches + (self.blocks.nbytes if self.blocks is not None else 0)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over geometry, branches and blocks, in hexadecimal: equal digests compute the same attention."""
        blocks = self.blocks.digest if self.blocks is not None else ""
        branches = [attrs.astuple(branch) for branch in self.branches]
        return hashlib.sha256(repr((self.geometry.identity, branches, blocks)).encode()).hexdigest()

    @cached_property
    def pairs(self) -> int:
        """Counted (query, key) pairs over all query heads, each as often as it counts."""
        from .counting import branch_pairs

        blocks = self.blocks.pairs if self.blocks is not None else 0
        return blocks + sum(branch_pairs(branch, self.geometry) for branch in self.branches)

    @cached_property
    def distinct_pairs(self) -> int | None:
        """(query, key) pairs over all query heads that count at least once; None where counting them takes long."""
        from .counting import distinct_pairs

        return distinct_pairs(self.branches, self.blocks, self.geometry)

    @cached_property
    def keyless_queries(self) -> int | None:
        """Queries over all query heads that see no key.

        None with blocks, where keys are at other positions, or where counting takes long.
        """
        from .counting import keyless_queries

        geometry = self.geometry
        same = (geometry.q_len, geometry.q_offset) == (geometry.kv_len, geometry.kv_offset)
        return keyless_queries(self.branches, geometry) if same and self.blocks is None else None

    @property
    def density(self) -> float | None:
        """Distinct pairs as a fraction of those that causality allows; 0 where it allows none."""
        from .counting import allowed_pairs

        allowed = allowed_pairs(self.geometry)
        if self.distinct_pairs is None:
            return None
        return self.distinct_pairs / allowed if allowed else 0.0
