"""Tables of blocks as kernels of others read them: of each row, and of each column, how many it meets, and which.

Shapes: E listed blocks; T tables, R rows and C columns of blocks; H heads.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Final, Self

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.counting import entry_rows, entry_tables

if TYPE_CHECKING:
    from ..core.layout import BlockLayout

INT_BYTES: Final = 4  # of each number in a table


@attrs.frozen(eq=False)
class ListedBlocks:
    """The blocks of a layout one by one; a table for each head that sees others.

    Attributes:
        tables: T.
        rows: R.
        cols: C.
        table: (E,) int64.
        row: (E,) int64.
        col: (E,) int64.
        mask_ids: (E,) int32, -1 of those all of whose pairs count.
        heads: the table of each head; of one for all where all see the same.
        narrowest: the least width of a list.
    """

    tables: int
    rows: int
    cols: int
    table: NDArray[np.int64]
    row: NDArray[np.int64]
    col: NDArray[np.int64]
    mask_ids: NDArray[np.int32]
    heads: NDArray[np.int32]
    narrowest: int

    @classmethod
    def of(cls, blocks: BlockLayout, mask_ids: NDArray[np.int32] | None = None, *, narrowest: int = 1) -> Self:
        """Those of a layout; with other masks than its own if these are given."""
        tables, rows = blocks.row_ptr.shape[0], blocks.row_ptr.shape[1] - 1
        cols = -(-blocks.geometry.kv_len // blocks.block_size)
        table, row, col = entry_tables(blocks), entry_rows(blocks), blocks.cols.astype(np.int64)
        ids = blocks.mask_ids if mask_ids is None else mask_ids
        heads = blocks.head_table if tables > 1 else blocks.head_table[:1]
        return cls(tables, rows, cols, table, row, col, ids, heads, narrowest)

    @cached_property
    def widths(self) -> tuple[int, int]:
        """The most blocks in a row, and in a column, with a mask or without, whichever are more.

        One width for both, since FlexAttention (PyTorch 2.11) reads lists of either with the strides of the first.
        """
        masked = self.mask_ids >= 0

        def widest(along: NDArray[np.int64], count: int) -> int:
            places = (np.bincount(self.table[kind] * count + along[kind]) for kind in (masked, ~masked))
            return max(int(found.max(initial=self.narrowest)) for found in places)

        return widest(self.row, self.rows), widest(self.col, self.cols)

    @property
    def lists_nbytes(self) -> int:
        """Bytes of all lists."""
        in_row, in_col = self.widths
        return INT_BYTES * self.heads.size * 2 * (self.rows * (in_row + 1) + self.cols * (in_col + 1))

    def lists(self, device: torch.device, *, of_keys: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each row or column how many have a mask, and which, and how many have none, and which.

        Counts are (1, H, R or C) and indices (1, H, R or C, width) int32, for one head where all see the same.
        """
        along, across, count = (self.col, self.row, self.cols) if of_keys else (self.row, self.col, self.rows)
        shape = self.tables, count, self.widths[of_keys]

        def listed(chosen: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
            counts, indices = _block_lists(self.table[chosen], along[chosen], across[chosen], shape)
            counts, indices = (x[self.heads].reshape(1, -1, *x.shape[1:]) for x in (counts, indices))
            return moved(counts, device), moved(indices, device)

        return *listed(self.mask_ids >= 0), *listed(self.mask_ids < 0)


def moved(x: NDArray[np.generic], device: torch.device) -> Tensor:
    """It on the device; on a CPU it may share its memory."""
    return torch.from_numpy(np.require(x, requirements=["C", "W"])).to(device)


def _block_lists(
    table: NDArray[np.int64], row: NDArray[np.int64], col: NDArray[np.int64], shape: tuple[int, int, int]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Counts (T, R) and columns (T, R, width), ascending and then 0, of blocks that are given one by one.

    Args:
        table: of each block, its table.
        row: its row.
        col: its column.
        shape: T tables, R rows, and the width of the lists.
    """
    place = table * shape[1] + row
    order = np.lexsort((col, place))
    counts = np.bincount(place, minlength=shape[0] * shape[1])
    within = np.arange(place.size) - np.repeat(np.cumsum(counts) - counts, counts)
    indices = np.zeros((shape[0] * shape[1], shape[2]), dtype=np.int32)
    indices[place[order], within] = col[order]
    return counts.astype(np.int32).reshape(shape[:2]), indices.reshape(shape)
