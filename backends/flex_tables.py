"""A table of blocks as FlexAttention reads it: lists of blocks both ways, and what each pair counts.

The lists are made here, not by `create_block_mask`, which looks at every pair. FlexAttention tells its modifiers
nothing but positions, so blocks with a mask are found through a dense table of their numbers: the bytes of all this
grow with the square of the number of blocks.

Shapes: H heads, T tables, R block rows, C block columns, E listed blocks, M masks, b block size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from ..core.counting import entry_rows, entry_tables
from ..core.layout import BlockLayout
from .block_lists import block_lists

if TYPE_CHECKING:
    from ..core.geometry import Geometry

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_LISTS = 4  # blocks with and without a mask, of queries and of keys
_NUMBER_BYTES = 4
_FULL, _ABSENT = -1, -2  # in the place of a mask's number


def table_bytes(geometry: Geometry, block_size: int, tables: int) -> int:
    """Bytes of the lists and of the masks' numbers, for as many different tables."""
    rows, cols = -(-geometry.q_len // block_size), -(-geometry.kv_len // block_size)
    listed = geometry.num_heads if tables > 1 else 1
    return _NUMBER_BYTES * rows * cols * (_LISTS * listed + tables)


@attrs.frozen(eq=False)
class FlexTables:
    """What a call of `flex_attention` takes beside its tensors.

    Attributes:
        block_mask: the lists, with the masks as its mask_mod.
        score_mod: adds the logarithm of how often a pair counts; None where none counts more than once.
        nbytes: memory of all tables on the device.
    """

    block_mask: BlockMask
    score_mod: ScoreMod | None
    nbytes: int

    @classmethod
    def of(cls, layout: BlockLayout, device: torch.device) -> FlexTables:
        """Sort the blocks into lists. Full blocks that count more than once get a constant mask."""
        geometry, size = layout.geometry, layout.block_size
        tables, rows = layout.row_ptr.shape[0], layout.row_ptr.shape[1] - 1
        cols = -(-geometry.kv_len // size)
        table, row, col = entry_tables(layout), entry_rows(layout), layout.cols.astype(np.int64)
        ids, masks = _with_weights(layout)
        numbers = np.full((tables, rows, cols), _ABSENT, dtype=np.int32)
        numbers[table, row, col] = ids  # _FULL for blocks that need no mask
        heads = layout.head_table if tables > 1 else layout.head_table[:1]

        def lists(chosen: NDArray[np.bool_], *, transposed: bool) -> tuple[Tensor, Tensor]:
            shape, along, across = (tables, rows, cols), row, col
            if transposed:
                shape, along, across = (tables, cols, rows), col, row
            found = block_lists(table[chosen], along[chosen], across[chosen], shape)
            counts, indices = (torch.from_numpy(array[heads][None]).to(device) for array in found)
            return counts, indices

        masked = ids >= 0
        head_table, number_table, mask_table = (
            torch.from_numpy(np.array(array)).to(device) for array in (layout.head_table, numbers, masks)
        )
        mask_mod, score_mod = _modifiers(head_table, number_table, mask_table, size)
        keys = *lists(masked, transposed=False), *lists(~masked, transposed=False)
        queries = *lists(masked, transposed=True), *lists(~masked, transposed=True)
        shape = geometry.q_len, geometry.kv_len
        block_mask = BlockMask(shape, *keys, *queries, BLOCK_SIZE=(size, size), mask_mod=mask_mod)
        nbytes = sum(x.nbytes for x in (*keys, *queries, head_table, number_table, mask_table))
        return cls(block_mask, score_mod if masks.max(initial=0) > 1 else None, nbytes)


def _with_weights(layout: BlockLayout) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Mask ids and masks (at least one), with one of each weight above 1 for full blocks."""
    ids, size = layout.mask_ids.copy(), layout.block_size
    heavy = np.flatnonzero((ids < 0) & (layout.weights > 1))
    weights, kind = np.unique(layout.weights[heavy], return_inverse=True)
    ids[heavy] = len(layout.masks) + kind.ravel()
    constant = np.broadcast_to(weights.astype(np.uint8)[:, None, None], (len(weights), size, size))
    masks = np.concatenate([layout.masks.reshape(-1, size, size), constant])
    return ids, masks if len(masks) else np.ones((1, size, size), dtype=np.uint8)


def _modifiers(heads: Tensor, numbers: Tensor, masks: Tensor, size: int) -> tuple[MaskMod, ScoreMod]:
    """mask_mod, true of whatever is seen, listed or not; score_mod, the logarithm of how often it counts."""

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        number = numbers[heads[head], query // size, key // size]
        inside = masks[number.clamp(min=0), query % size, key % size] > 0
        return torch.where(number < 0, number == _FULL, inside)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        number = numbers[heads[head], query // size, key // size]
        count = masks[number.clamp(min=0), query % size, key % size]
        weight = torch.where(number < 0, 1.0, count.to(torch.float32).clamp(min=1.0))
        return score + weight.log()

    return mask_mod, score_mod
