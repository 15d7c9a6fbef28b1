"""A table of blocks as FlexAttention reads it: lists of blocks both ways, and what each pair counts.

The lists are made here, not by `create_block_mask`, which looks at every pair. FlexAttention tells its modifiers
nothing but positions, so blocks with a mask are found through a dense table of their numbers: the bytes of all this
grow with the square of the number of blocks.

Shapes: H heads, T tables, R block rows, C block columns, E listed blocks, M masks, b block size.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Final, NamedTuple

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .block_lists import INT_BYTES, ListedBlocks, moved

if TYPE_CHECKING:
    from ..core.geometry import Geometry
    from ..core.layout import BlockLayout

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

BLOCK_SIZE: Final = 128
_BLOCK: Final = BLOCK_SIZE, BLOCK_SIZE
_NARROWEST: Final = 2  # of lists: 1 would be something else to a compiler
_FULL: Final = -1  # in the place of a mask's number
_ABSENT: Final = -2  # likewise


def bounds_of_bytes(geometry: Geometry, tables: int) -> tuple[int, int]:
    """The least and the most that the lists and the masks' numbers take, of as many different tables."""
    rows, cols = -(-geometry.q_len // BLOCK_SIZE), -(-geometry.kv_len // BLOCK_SIZE)
    listed = geometry.num_heads if tables > 1 else 1
    widest = 2 * (rows * (1 + max(cols, _NARROWEST)) + cols * (1 + max(rows, _NARROWEST)))
    return INT_BYTES * tables * rows * cols, INT_BYTES * (tables * rows * cols + listed * widest)


@attrs.frozen(eq=False)
class WeightedBlocks:
    """The blocks of a layout one by one, and masks that say how often each of their pairs counts.

    Attributes:
        listed: the blocks.
        head_table: (H,) int32, the table of each head.
        masks: (M, b, b) uint8, two at least: a single one would be something else to a compiler.
    """

    listed: ListedBlocks
    head_table: NDArray[np.int32]
    masks: NDArray[np.uint8]

    @classmethod
    def of(cls, layout: BlockLayout) -> WeightedBlocks:
        """Those of a layout of blocks of `BLOCK_SIZE`: full ones that count more than once get a constant mask."""
        assert layout.block_size == BLOCK_SIZE
        ids = layout.mask_ids.copy()
        heavy = np.flatnonzero((ids < 0) & (layout.weights > 1))
        weights, kind = np.unique(layout.weights[heavy], return_inverse=True)
        ids[heavy] = len(layout.masks) + kind.ravel()
        constant = np.broadcast_to(weights.astype(np.uint8)[:, None, None], (len(weights), *_BLOCK))
        unused = np.zeros((max(0, 2 - len(layout.masks) - len(weights)), *_BLOCK), dtype=np.uint8)
        masks = np.concatenate([layout.masks.reshape(-1, *_BLOCK), constant, unused])
        return cls(ListedBlocks.of(layout, ids, narrowest=_NARROWEST), layout.head_table, masks)

    @property
    def grid(self) -> tuple[int, int, int]:
        """T, R and C."""
        return self.listed.tables, self.listed.rows, self.listed.cols

    @property
    def nbytes(self) -> int:
        """Bytes of the lists and of the masks' numbers."""
        return self.listed.lists_nbytes + INT_BYTES * prod(self.grid)


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
    def of(cls, blocks: WeightedBlocks, device: torch.device) -> FlexTables:
        """The tables of a layout, on the device."""
        listed = blocks.listed
        numbers = np.full(blocks.grid, _ABSENT, dtype=np.int32)
        numbers[listed.table, listed.row, listed.col] = listed.mask_ids  # _FULL for blocks that need no mask
        return cls(
            lists=(*listed.lists(device, of_keys=False), *listed.lists(device, of_keys=True)),
            heads=moved(blocks.head_table, device),
            numbers=moved(numbers, device),
            masks=moved(blocks.masks, device),
            is_weighted=bool(blocks.masks.max(initial=0) > 1),
        )


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
