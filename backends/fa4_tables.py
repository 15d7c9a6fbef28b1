"""A table of blocks as FlashAttention-4 reads it: lists of blocks both ways, and masks as bits.

Shapes: B batch, S query length, T key length, H heads, D head_dim; N tables, R rows and C columns of blocks, E listed
blocks, M masks.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.counting import entry_rows, entry_tables
from ..core.errors import ConfigError
from ..core.layout import BlockLayout
from .block_lists import block_lists
from .fa4_library import Library

if TYPE_CHECKING:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

BLOCK: Final = 128  # queries and keys: its backward has tiles of as many keys, and takes no smaller blocks
_WORD: Final = 32  # bits of a number
_INT_BYTES: Final = 4


def takes(blocks: BlockLayout) -> bool:
    """Whether its lists can say it: blocks of `BLOCK` of which no pair counts twice."""
    return blocks.block_size == BLOCK and bool((blocks.weights <= 1).all()) and blocks.masks.max(initial=0) <= 1


@attrs.frozen(eq=False)
class MaskBits:
    """What tells the kernels which pairs of a block count.

    Attributes:
        tables: (H,) int32, the table of `numbers` of each head.
        numbers: (N, R, C) int32, the mask of each block that has one; C is 2 at least.
        bits: (M, `BLOCK`, `BLOCK` / 32) int32, of each of its pairs.
    """

    tables: Tensor
    numbers: Tensor
    bits: Tensor

    @property
    def nbytes(self) -> int:
        """Memory of all of it."""
        return self.tables.nbytes + self.numbers.nbytes + self.bits.nbytes


@attrs.frozen(eq=False)
class FlashAttention4Table:
    """A `BlockTable` in FlashAttention-4.

    Attributes:
        name: the kernel, as traces show it.
        scale: factor on q·k, above 0.
        library: what it calls.
        of_queries: the blocks of each row.
        of_keys: the blocks of each column.
        masks: those of blocks of which not all pairs count; None if there are none.
    """

    name: str
    scale: float
    library: Library
    of_queries: BlockSparseTensorsTorch
    of_keys: BlockSparseTensorsTorch
    masks: MaskBits | None

    @property
    def nbytes(self) -> int:
        """Memory of the lists and masks."""
        lists = sum(x.nbytes for side in (self.of_queries, self.of_keys) for x in side if isinstance(x, Tensor))
        return lists + (0 if self.masks is None else self.masks.nbytes)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `BlockTable.forward`."""
        return self.library.forward(query, key, value, self.scale, self._said(self.of_queries))

    def gradients(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `BlockTable.gradients`."""
        how = self._said(self.of_keys)
        return self.library.backward(dout, query, key, value, out, lse, dlse, self.scale, how)

    def _said(self, lists: BlockSparseTensorsTorch) -> dict[str, object]:
        """What of the scores counts."""
        if self.masks is None:
            return {"block_sparse_tensors": lists}
        from .fa4_masks import in_mask

        tensors = [self.masks.tables, self.masks.numbers, self.masks.bits]
        return {"block_sparse_tensors": lists, "mask_mod": in_mask, "aux_tensors": tensors}


@attrs.frozen(eq=False)
class Listed:
    """The blocks of a layout one by one; a table for each head that sees others.

    Attributes:
        tables: N.
        rows: R.
        cols: C.
        table: (E,) int64.
        row: (E,) int64.
        col: (E,) int64.
        mask_ids: (E,) int32, -1 of those all of whose pairs count.
        heads: the table of each head; of one for all where all see the same.
    """

    tables: int
    rows: int
    cols: int
    table: NDArray[np.int64]
    row: NDArray[np.int64]
    col: NDArray[np.int64]
    mask_ids: NDArray[np.int32]
    heads: NDArray[np.int32]

    @classmethod
    def of(cls, blocks: BlockLayout) -> Listed:
        """Those of a layout."""
        tables, rows = blocks.row_ptr.shape[0], blocks.row_ptr.shape[1] - 1
        cols = -(-blocks.geometry.kv_len // BLOCK)
        table, row, col = entry_tables(blocks), entry_rows(blocks), blocks.cols.astype(np.int64)
        heads = blocks.head_table if tables > 1 else blocks.head_table[:1]
        return cls(tables, rows, cols, table, row, col, blocks.mask_ids, heads)

    @cached_property
    def numbered(self) -> tuple[NDArray[np.int64], int]:
        """In which table of masks each block's is, and how many there are: one, unless tables say different ones."""
        masked = self.mask_ids >= 0
        ids = self.mask_ids[masked].astype(np.int64)
        place = self.row[masked] * self.cols + self.col[masked]
        if np.unique(place).size == np.unique(place * (ids.max(initial=0) + 1) + ids).size:
            return np.zeros_like(self.table), 1
        return self.table, self.tables

    @property
    def mask_cols(self) -> int:
        """Columns of `MaskBits.numbers`: the library refuses a tensor with stride 1 in more than one dimension."""
        return max(self.cols, 2)

    @cached_property
    def widths(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The most blocks with a mask in a row, and in a column, at least 1; and those without."""
        return self._widths(self.mask_ids >= 0), self._widths(self.mask_ids < 0)

    def _widths(self, chosen: NDArray[np.bool_]) -> tuple[int, int]:
        rows = np.bincount(self.table[chosen] * self.rows + self.row[chosen])
        cols = np.bincount(self.table[chosen] * self.cols + self.col[chosen])
        return int(rows.max(initial=1)), int(cols.max(initial=1))

    def nbytes(self, masks: int) -> int:
        """Bytes of lists and masks."""
        total = 0
        for in_row, in_col in self.widths:
            total += self.heads.size * (self.rows * (in_row + 1) + self.cols * (in_col + 1))
        if masks:
            total += self.numbered[1] * self.rows * self.mask_cols + masks * BLOCK * BLOCK // _WORD
        return _INT_BYTES * total

    def lists(self, device: torch.device, *, of_keys: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each row or column how many have a mask, and which, and how many have none, and which."""
        along, across, count = (self.col, self.row, self.cols) if of_keys else (self.row, self.col, self.rows)

        def listed(chosen: NDArray[np.bool_], widths: tuple[int, int]) -> tuple[Tensor, Tensor]:
            shape = self.tables, count, widths[of_keys]
            counts, indices = block_lists(self.table[chosen], along[chosen], across[chosen], shape)
            return _moved(counts[self.heads][None], device), _moved(indices[self.heads][None], device)

        masked, whole = self.widths
        return *listed(self.mask_ids >= 0, masked), *listed(self.mask_ids < 0, whole)

    def bits(self, blocks: BlockLayout, device: torch.device) -> MaskBits | None:
        """The masks; None where there are none."""
        masked = self.mask_ids >= 0
        if not masked.any():
            return None
        table, tables = self.numbered
        numbers = np.zeros((tables, self.rows, self.mask_cols), dtype=np.int32)
        numbers[table[masked], self.row[masked], self.col[masked]] = self.mask_ids[masked]
        heads = blocks.head_table if tables > 1 else np.zeros_like(blocks.head_table)
        words = np.packbits(blocks.masks, axis=-1, bitorder="little").view("<i4")
        return MaskBits(_moved(heads, device), _moved(numbers, device), _moved(words, device))


def _moved(x: NDArray[np.int32], device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(x)).to(device)


def checked(blocks: BlockLayout, limit_bytes: int) -> Listed:
    """The blocks, one by one.

    Raises:
        ConfigError: their lists and masks need more than `limit_bytes`.
    """
    listed, geometry = Listed.of(blocks), blocks.geometry
    needed = listed.nbytes(len(blocks.masks))
    if needed > limit_bytes:
        raise ConfigError(
            f"FlashAttention-4's lists for {geometry.q_len:,} queries and {geometry.kv_len:,} keys need {needed:,} "
            f"bytes, allowed are {limit_bytes:,}; raise Limits.layout_bytes or use another backend"
        )
    return listed
