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

from ..core.errors import ConfigError
from ..core.layout import BlockLayout
from .block_lists import INT_BYTES, ListedBlocks, moved
from .fa4_library import Library

if TYPE_CHECKING:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

BLOCK: Final = 128  # queries and keys: its backward has tiles of as many keys, and takes no smaller blocks
_WORD: Final = 32  # bits of a number


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


class Listed(ListedBlocks):
    """The blocks of a layout one by one, with masks as bits."""

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

    def nbytes(self, masks: int) -> int:
        """Bytes of lists and masks."""
        if not masks:
            return self.lists_nbytes
        numbers = self.numbered[1] * self.rows * self.mask_cols
        return self.lists_nbytes + INT_BYTES * (numbers + masks * BLOCK * BLOCK // _WORD)

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
        return MaskBits(moved(heads, device), moved(numbers, device), moved(words, device))


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
