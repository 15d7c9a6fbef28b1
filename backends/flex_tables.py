"""A table of blocks as FlexAttention reads it: lists of blocks both ways, and what each pair counts.

The lists are made here, not by `create_block_mask`, which looks at every pair. FlexAttention tells its modifiers
nothing but positions, so blocks with a mask are found through a dense table of their numbers: the bytes of all this
grow with the square of the number of blocks.

Shapes: H heads, T tables, R block rows, C block columns, E listed blocks, M masks, b block size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Final, NamedTuple

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.counting import entry_rows, entry_tables
from ..core.layout import BlockLayout
from .block_lists import block_lists

if TYPE_CHECKING:
    from ..core.geometry import Geometry

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

BLOCK_SIZE: Final = 128
_NUMBER_BYTES: Final = 4
_NARROWEST: Final = 2  # of lists: 1 would be something else to a compiler
_FULL: Final = -1  # in the place of a mask's number
_ABSENT: Final = -2  # likewise


def bounds_of_bytes(geometry: Geometry, tables: int) -> tuple[int, int]:
    """The least and the most that the lists and the masks' numbers take, of as many different tables."""
    rows, cols = -(-geometry.q_len // BLOCK_SIZE), -(-geometry.kv_len // BLOCK_SIZE)
    listed = geometry.num_heads if tables > 1 else 1
    widest = 2 * (rows * (1 + max(cols, _NARROWEST)) + cols * (1 + max(rows, _NARROWEST)))
    return _NUMBER_BYTES * tables * rows * cols, _NUMBER_BYTES * (tables * rows * cols + listed * widest)


@attrs.frozen(eq=False)
class ListedBlocks:
    """The blocks of a layout one by one, and how long lists of them are.

    Attributes:
        layout: of blocks of `BLOCK_SIZE`.
        table: (E,) int64.
        row: (E,) int64.
        col: (E,) int64.
        ids: (E,) int32, of the mask; -1 where all pairs count once.
        masks: (M, b, b) uint8.
    """

    layout: BlockLayout
    table: NDArray[np.int64]
    row: NDArray[np.int64]
    col: NDArray[np.int64]
    ids: NDArray[np.int32]
    masks: NDArray[np.uint8]

    @classmethod
    def of(cls, layout: BlockLayout) -> ListedBlocks:
        """Those of a layout."""
        assert layout.block_size == BLOCK_SIZE
        table, row, col = entry_tables(layout), entry_rows(layout), layout.cols.astype(np.int64)
        return cls(layout, table, row, col, *_with_weights(layout))

    @property
    def grid(self) -> tuple[int, int, int]:
        """T, R and C."""
        return *self.layout.row_ptr.shape[:1], self.layout.row_ptr.shape[1] - 1, -(-self._kv_len // BLOCK_SIZE)

    @property
    def heads(self) -> NDArray[np.int32]:
        """The table of each head; of one for all where all see the same."""
        return self.layout.head_table if self.grid[0] > 1 else self.layout.head_table[:1]

    @cached_property
    def lists(self) -> tuple[_List, _List, _List, _List]:
        """Blocks with a mask and blocks without, of each row, then of each column."""
        tables, rows, cols = self.grid
        masked, whole = self.ids >= 0, self.ids < 0

        def listed(kept: NDArray[np.bool_], along: NDArray[np.int64], across: NDArray[np.int64], count: int) -> _List:
            places = np.bincount(self.table[kept] * count + along[kept])
            width = max(_NARROWEST, int(places.max(initial=0)))
            return _List(kept, along, across, (tables, count, width))

        return (
            listed(masked, self.row, self.col, rows),
            listed(whole, self.row, self.col, rows),
            listed(masked, self.col, self.row, cols),
            listed(whole, self.col, self.row, cols),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the lists and of the masks' numbers."""
        listed = sum(count * (1 + width) for _, count, width in (x.shape for x in self.lists))
        return _NUMBER_BYTES * (prod(self.grid) + self.heads.size * listed)

    @property
    def _kv_len(self) -> int:
        return self.layout.geometry.kv_len


class _List(NamedTuple):
    """Which blocks it lists, in which rows, as which columns; tables, rows and the longest row."""

    kept: NDArray[np.bool_]
    along: NDArray[np.int64]
    across: NDArray[np.int64]
    shape: tuple[int, int, int]


class FlexTables(NamedTuple):
    """What FlexAttention reads of a layout, in tensors alone: what is compiled takes those of any other layout too.

    Attributes:
        lists: as `BlockMask` takes them: blocks with a mask and blocks without, of each row, then of each column; of
            both counts (1, H, R) and indices (1, H, R, the longest list) int32, for one head where all see the same.
        heads: (H,) int32, the table of each head.
        numbers: (T, R, C) int32, of each block the number of its mask; -1 if all its pairs count once, -2 if none does.
        masks: (M, b, b) uint8, how often each pair counts.
        is_weighted: whether any counts more than once.
    """

    lists: Lists
    heads: Tensor
    numbers: Tensor
    masks: Tensor
    is_weighted: bool

    @property
    def nbytes(self) -> int:
        """Memory of all tables on the device."""
        return sum(x.nbytes for x in (*self.lists, self.heads, self.numbers, self.masks))

    @classmethod
    def of(cls, blocks: ListedBlocks, device: torch.device) -> FlexTables:
        """The tables of a layout, on the device."""

        def moved(array: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)

        def lists(blocks_of: _List) -> tuple[Tensor, Tensor]:
            kept, along, across, shape = blocks_of
            counts, indices = block_lists(blocks.table[kept], along[kept], across[kept], shape)
            heads = blocks.heads
            return moved(counts[heads].reshape(1, -1, shape[1])), moved(indices[heads].reshape(1, -1, *shape[1:]))

        numbers = np.full(blocks.grid, _ABSENT, dtype=np.int32)
        numbers[blocks.table, blocks.row, blocks.col] = blocks.ids  # _FULL for blocks that need no mask
        keys, full_keys, queries, full_queries = (lists(x) for x in blocks.lists)
        tensors = moved(blocks.layout.head_table), moved(numbers), moved(blocks.masks)
        return cls((*keys, *full_keys, *queries, *full_queries), *tensors, bool(blocks.masks.max(initial=0) > 1))


def _with_weights(layout: BlockLayout) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Mask ids and masks, with one of each weight above 1 for full blocks.

    Two masks at least: a single one would be something else to a compiler.
    """
    ids, size = layout.mask_ids.copy(), layout.block_size
    heavy = np.flatnonzero((ids < 0) & (layout.weights > 1))
    weights, kind = np.unique(layout.weights[heavy], return_inverse=True)
    ids[heavy] = len(layout.masks) + kind.ravel()
    constant = np.broadcast_to(weights.astype(np.uint8)[:, None, None], (len(weights), size, size))
    missing = max(0, 2 - len(layout.masks) - len(weights))
    unused = np.zeros((missing, size, size), dtype=np.uint8)
    return ids, np.concatenate([layout.masks.reshape(-1, size, size), constant, unused])


def modifiers(tables: FlexTables) -> tuple[MaskMod, ScoreMod | None]:
    """mask_mod, true of whatever is seen, listed or not; score_mod, the logarithm of how often it counts.

    There is none where nothing counts more than once.
    """
    heads, numbers, masks = tables.heads, tables.numbers, tables.masks

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        number = numbers[heads[head], query // BLOCK_SIZE, key // BLOCK_SIZE]
        inside = masks[number.clamp(min=0), query % BLOCK_SIZE, key % BLOCK_SIZE] > 0
        return torch.where(number < 0, number == _FULL, inside)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        number = numbers[heads[head], query // BLOCK_SIZE, key // BLOCK_SIZE]
        count = masks[number.clamp(min=0), query % BLOCK_SIZE, key % BLOCK_SIZE]
        weight = torch.where(number < 0, 1.0, count.to(torch.float32).clamp(min=1.0))
        return score + weight.log()

    return mask_mod, score_mod if tables.is_weighted else None
