"""A table of blocks as FlashAttention-4 reads it: lists of blocks both ways, and masks as bits.

Shapes: B batch, S query length, T key length, H heads, D head_dim; N tables, R rows and C columns of blocks, E listed
blocks, M masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import ConfigError
from ..core.layout import BlockLayout
from .block_lists import block_lists
from .libraries import aligned

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
        numbers: (N, R, C) int32, the mask of each block that has one.
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
        run_forward: the library's forward.
        run_backward: its backward.
        of_queries: the blocks of each row.
        of_keys: the blocks of each column.
        masks: those of blocks of which not all pairs count; None if there are none.
    """

    name: str
    scale: float
    run_forward: Callable[..., tuple[Tensor, ...]]
    run_backward: Callable[..., tuple[Tensor, ...]]
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
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            out, lse, *_ = self.run_forward(
                *aligned(query, key, value),
                softmax_scale=self.scale,
                block_sparse_tensors=self.of_queries,
                return_lse=True,
                **self._masked(),
            )
        return out, lse

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
        query, key, value, out, dout = aligned(query, key, value, out, dout)
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            dq, dk, dv = self.run_backward(
                query,
                key,
                value,
                out,
                dout,
                lse.contiguous(),
                softmax_scale=self.scale,
                block_sparse_tensors=self.of_keys,
                dlse=None if dlse is None else dlse.contiguous(),
                **self._masked(),
            )
        return dq, dk, dv

    def _masked(self) -> dict[str, object]:
        if self.masks is None:
            return {}
        from .fa4_masks import in_mask

        return {"mask_mod": in_mask, "aux_tensors": [self.masks.tables, self.masks.numbers, self.masks.bits]}


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
        row = np.repeat(np.tile(np.arange(rows), tables), np.diff(blocks.row_ptr, axis=1).ravel())
        table = np.repeat(np.arange(tables), np.diff(blocks.row_ptr[:, [0, -1]], axis=1).ravel())
        often = blocks.weights.astype(np.int64)
        masked = blocks.mask_ids >= 0
        often[masked] = blocks.masks.max(axis=(1, 2), initial=0)[blocks.mask_ids[masked]]
        table, row, col, ids = (
            np.repeat(x, often) for x in (table, row, blocks.cols.astype(np.int64), blocks.mask_ids)
        )
        heads = blocks.head_table if tables > 1 else blocks.head_table[:1]
        return cls(tables, rows, -(-blocks.geometry.kv_len // BLOCK), table, row, col, ids, heads)

    def numbered(self) -> tuple[NDArray[np.int64], int]:
        """In which table of masks each block's is, and how many there are: one, unless tables say different ones."""
        masked = self.mask_ids >= 0
        place = self.row[masked] * self.cols + self.col[masked]
        found = np.unique(np.stack([place, self.mask_ids[masked]]), axis=1)
        if np.unique(found[0]).size == found.shape[1]:
            return np.zeros_like(self.table), 1
        return self.table, self.tables

    def widths(self, chosen: NDArray[np.bool_]) -> tuple[int, int]:
        """The most of these blocks in a row, and in a column; at least 1."""
        rows = np.bincount(self.table[chosen] * self.rows + self.row[chosen], minlength=1)
        cols = np.bincount(self.table[chosen] * self.cols + self.col[chosen], minlength=1)
        return max(1, int(rows.max())), max(1, int(cols.max()))

    def nbytes(self, masks: int) -> int:
        """Bytes of lists and masks."""
        total = 0
        for chosen in (self.mask_ids >= 0, self.mask_ids < 0):
            in_row, in_col = self.widths(chosen)
            total += self.heads.size * (self.rows * (in_row + 1) + self.cols * (in_col + 1))
        if masks:
            total += self.numbered()[1] * self.rows * self.cols + masks * BLOCK * BLOCK // _WORD
        return _INT_BYTES * total

    def lists(self, device: torch.device, *, of_keys: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each row or column how many have a mask, and which, and how many have none, and which."""
        along, across, count = (self.col, self.row, self.cols) if of_keys else (self.row, self.col, self.rows)

        def listed(chosen: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
            shape = self.tables, count, self.widths(chosen)[of_keys]
            counts, indices = block_lists(self.table[chosen], along[chosen], across[chosen], shape)
            return _moved(counts[self.heads][None], device), _moved(indices[self.heads][None], device)

        return *listed(self.mask_ids >= 0), *listed(self.mask_ids < 0)

    def bits(self, blocks: BlockLayout, device: torch.device) -> MaskBits | None:
        """The masks; None where there are none."""
        masked = self.mask_ids >= 0
        if not masked.any():
            return None
        table, tables = self.numbered()
        numbers = np.zeros((tables, self.rows, self.cols), dtype=np.int32)
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
