"""Tables of blocks that a gate names at every call, made on the device without a word from it.

How many blocks each row keeps, and how many of them have a mask, follows from the geometry alone; which blocks keys
find themselves in does not, and is sorted out at every backward pass.

Shapes: B batch, H heads, T = B·H tables, R block rows, C block columns, E blocks of a table, b block size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs
import torch
from torch import Tensor

from ...core.dynamic_tables import KINDS, dynamic_pairs, kept_blocks, mask_kinds, masks_of
from .block_tables import BlockTables, bits_of

if TYPE_CHECKING:
    from ...core.geometry import Geometry
    from ...core.pattern import LearnedPattern


@attrs.frozen(eq=False)
class NamedBlocks:
    """What is known of them before they are named: `launches.Blocks`.

    Attributes:
        geometry: of the calls.
        block_size: b.
        pairs: that each batch row counts.
        rows: (E,) int64, the block row of each block, ascending; in a row those without a mask come first.
        slots: (E,) int64, its column in the gate's table.
        is_masked: (E,) bool.
        starts: (2·R,) int64, where the blocks of each row begin, and those of them with a mask.
        masks: (4·KINDS, 2, b, b / 32) int32 as in `BlockTables`, of `masks_of`, then of the same in the last block row.
    """

    geometry: Geometry
    block_size: int
    pairs: int
    rows: Tensor
    slots: Tensor
    is_masked: Tensor
    starts: Tensor
    masks: Tensor
    occurrences: ClassVar[int] = 1  # of a pair

    @classmethod
    def of(cls, pattern: LearnedPattern, geometry: Geometry, device: torch.device) -> NamedBlocks:
        """Of calls with this geometry."""
        size = pattern.block_size
        cut, whole = kept_blocks(pattern, geometry)
        kept = cut + whole
        if geometry.q_len % size:  # keys read no query past the end
            cut[-1], whole[-1] = kept[-1], 0
        rows = torch.repeat_interleave(torch.arange(len(kept), device="cpu"), kept)
        begins = kept.cumsum(0) - kept
        place = torch.arange(len(rows), device="cpu") - begins[rows]
        is_masked = place >= whole[rows]
        slots = torch.where(is_masked, place - whole[rows], place + cut[rows])  # the table has those first
        starts = torch.stack([begins, begins + whole], dim=1).flatten()
        masks = masks_of(geometry, size)
        in_last = torch.arange(size, device="cpu")[:, None] < (geometry.q_len - 1) % size + 1
        masks = torch.from_numpy(bits_of(torch.cat([masks, masks & in_last]).numpy()))
        moved = (x.to(device) for x in (rows, slots, is_masked, starts, masks))
        return cls(geometry, size, dynamic_pairs(pattern, geometry), *moved)

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""
        return sum(x.nbytes for x in (self.rows, self.slots, self.is_masked, self.starts, self.masks))

    def tables(self, named: Tensor | None, *, transposed: bool) -> BlockTables:
        """One direction of the blocks that a gate has `named`, (B, H, R, k) int64 as `Gate.forward` returns them."""
        assert named is not None
        geometry, size = self.geometry, self.block_size
        batch, heads, block_rows, _ = named.shape
        tables, device = batch * heads, named.device
        rows, columns = self.rows.expand(tables, -1), named.flatten(0, 1)[:, self.rows, self.slots]
        kinds = mask_kinds(geometry, size, rows, columns) + 2 * KINDS * (rows == block_rows - 1)
        starts = self.starts.expand(tables, -1)
        if transposed:
            block_rows = -(-geometry.kv_len // size)
            by_column, order = torch.sort((2 * columns + self.is_masked).int(), dim=1, stable=True)
            columns, kinds = rows.gather(1, order), kinds.gather(1, order)
            wanted = torch.arange(2 * block_rows, dtype=torch.int32, device=device)
            starts = torch.searchsorted(by_column, wanted.repeat(tables, 1))
        each = columns.shape[1]
        starts = (starts + torch.arange(tables, device=device)[:, None] * each).flatten()
        ends = torch.cat([starts, starts.new_full((1,), tables * each)])
        tensors = (
            torch.arange(tables, dtype=torch.int32, device=device),
            ends.to(torch.int32),
            columns.flatten().to(torch.int32),
            torch.zeros(tables * each, dtype=torch.float32, device=device),
            kinds.flatten().to(torch.int32),
            self.masks,
        )
        return BlockTables(size, block_rows, tensors, batch_tables=heads)
