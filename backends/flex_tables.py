"""A table of blocks as FlexAttention reads it: lists of blocks both ways, and what each pair counts.

The lists are made here, not by `create_block_mask`, which looks at every pair. FlexAttention tells its modifiers
nothing but positions, so blocks with a mask are found through a dense table of their numbers: the bytes of all this
grow with the square of the number of blocks.

Shapes: H heads, T tables, R block rows, C block columns, E listed blocks, M masks, b block size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.counting import entry_rows, entry_tables
from ..core.errors import ConfigError
from ..core.layout import BlockLayout
from .block_lists import block_lists

if TYPE_CHECKING:
    from ..core.geometry import Geometry

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

BLOCK_SIZE: Final = 128
REMEDY: Final = "raise Limits.layout_bytes, shorten the sequence or use another backend"
_LISTS: Final = 4  # blocks with and without a mask, of queries and of keys
_NUMBER_BYTES: Final = 4
_FULL: Final = -1  # in the place of a mask's number
_ABSENT: Final = -2  # likewise


def table_bytes(geometry: Geometry, tables: int) -> int:
    """Most bytes of the lists and of the masks' numbers, for as many different tables."""
    rows, cols = -(-geometry.q_len // BLOCK_SIZE), -(-geometry.kv_len // BLOCK_SIZE)
    listed = geometry.num_heads if tables > 1 else 1
    return _NUMBER_BYTES * rows * cols * (_LISTS * listed + tables)


class FlexTables(NamedTuple):
    """What FlexAttention reads of a layout, in tensors alone: what is compiled takes those of any other layout too.

    Attributes:
        lists: as `BlockMask` takes them: blocks with a mask and blocks without, of each row, then of each column; of
            both counts (1, H, R) and indices (1, H, R, the longest list) int32, for one head where all see the same.
        heads: (H,) int32, the table of each head.
        numbers: (T, R, C) int32, of each block the number of its mask; -1 if all its pairs count once, -2 if none does.
        masks: (M, b, b) uint8, how often each pair counts.
        score_weights: whether any counts more than once.
    """

    lists: Lists
    heads: Tensor
    numbers: Tensor
    masks: Tensor
    score_weights: bool

    @property
    def nbytes(self) -> int:
        """Memory of all tables on the device."""
        return sum(x.nbytes for x in (*self.lists, self.heads, self.numbers, self.masks))

    @classmethod
    def of(cls, layout: BlockLayout, device: torch.device, limit_bytes: int) -> FlexTables:
        """Sort the blocks into lists. Full blocks that count more than once get a constant mask.

        Raises:
            ConfigError: the lists and the numbers need more than `limit_bytes`.
        """
        geometry = layout.geometry
        tables, rows = layout.row_ptr.shape[0], layout.row_ptr.shape[1] - 1
        cols = -(-geometry.kv_len // BLOCK_SIZE)
        table, row, col = entry_tables(layout), entry_rows(layout), layout.cols.astype(np.int64)
        ids, masks = _with_weights(layout)
        heads = layout.head_table if tables > 1 else layout.head_table[:1]
        masked, whole = ids >= 0, ids < 0
        of_keys = (masked, row, col, rows), (whole, row, col, rows)
        of_queries = (masked, col, row, cols), (whole, col, row, cols)
        shapes = [
            (tables, count, _width(table[kept] * count + along[kept]))
            for kept, along, _, count in (*of_keys, *of_queries)
        ]
        listed = heads.size * sum(count * (1 + width) for _, count, width in shapes)
        needed = _NUMBER_BYTES * (tables * rows * cols + listed)
        if needed > limit_bytes:
            raise ConfigError(
                f"FlexAttention's tables for {geometry.q_len:,} queries and {geometry.kv_len:,} keys need {needed:,} "
                f"bytes, allowed are {limit_bytes:,}; {REMEDY}"
            )
        numbers = np.full((tables, rows, cols), _ABSENT, dtype=np.int32)
        numbers[table, row, col] = ids  # _FULL for blocks that need no mask

        def moved(array: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(np.array(array)).to(device)

        def lists(
            kept: NDArray[np.bool_], along: NDArray[np.int64], across: NDArray[np.int64], shape: tuple[int, int, int]
        ) -> tuple[Tensor, Tensor]:
            counts, indices = block_lists(table[kept], along[kept], across[kept], shape)
            return moved(counts[heads][None]), moved(indices[heads][None])

        keys, full_keys, queries, full_queries = (
            lists(kept, along, across, shape)
            for (kept, along, across, _), shape in zip((*of_keys, *of_queries), shapes, strict=True)
        )
        tensors = moved(layout.head_table), moved(numbers), moved(masks)
        return cls((*keys, *full_keys, *queries, *full_queries), *tensors, bool(masks.max(initial=0) > 1))


def _width(places: NDArray[np.int64]) -> int:
    """The longest list of blocks that lie in such rows; 2 at least, since to a compiler 1 would be something else."""
    return max(2, int(np.bincount(places).max(initial=0)))


def _with_weights(layout: BlockLayout) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Mask ids and masks, with one of each weight above 1 for full blocks.

    Two masks at least, as `_width` says.
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

    return mask_mod, score_mod if tables.score_weights else None
