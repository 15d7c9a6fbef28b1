"""Attention over blocks that a gate names anew at every call, run by the same block product as any table of blocks.

Shapes: B batch, S query length, T key length, H query heads, K key-value heads, R block rows, C block columns, b block
size, k columns of the tables. How many blocks each row keeps, and how many of them the causal diagonal or the end of
the keys cuts, follows from the geometry alone; so all but the block numbers is made once for a length, and a call costs
no synchronisation with the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import attrs
import torch
from torch import Tensor

from .block_product import BlockProduct, ItemClass
from .merging import accumulator_dtype

if TYPE_CHECKING:
    from .geometry import Geometry
    from .pattern import LearnedPattern

KINDS = 4  # of a block against the diagonal: in the future, cut once or (offsets apart) twice, in the past


class TableRows(NamedTuple):
    """What the geometry says about each block row; all (R,) int64. (torch.compile traces no attrs classes.)

    Attributes:
        before: key blocks that end before the row's first query, or all blocks where attention is not causal.
        visible: key blocks that begin no later than the row's last query; those from `before` on are cut by the
            diagonal.
        kept: blocks that the row's table lists.
    """

    before: Tensor
    visible: Tensor
    kept: Tensor

    @classmethod
    def of(
        cls, pattern: LearnedPattern, q_len: int, kv_len: int, shift: int, *, is_causal: bool, device: torch.device
    ) -> TableRows:
        """The rows of a call whose first query stands `shift` positions after its first key; kv_len at least 1.

        Lengths and shift may be symbolic, as torch.compile has them.
        """
        size = pattern.block_size
        rows, cols = -(-q_len // size), -(-kv_len // size)
        if not is_causal:
            every = torch.full((rows,), cols, dtype=torch.int64, device=device)
            return cls(every, every, pattern.take(every))
        first = torch.arange(rows, device=device) * size + shift
        last = (first + size).clamp(max=q_len + shift) - 1
        before = torch.where(first >= kv_len, cols, torch.where(first < 0, 0, first // size))
        visible = torch.where(last < 0, 0, (last // size + 1).clamp(max=cols))
        return cls(before, visible, torch.maximum(pattern.take(visible), visible - before))


@attrs.frozen(eq=False)
class DynamicTables:
    """Everything about one geometry that does not depend on the tables.

    Attributes:
        geometry: of the calls.
        block_size: b.
        groups: block rows (n,) int64 that have equally many cut and uncut blocks, with both numbers.
        bias: (8, b, b), 0 or -inf as `masks_of`.
        scale: factor on q·k.
        workspace_bytes: bound on the temporaries of one step.
    """

    geometry: Geometry
    block_size: int
    groups: tuple[tuple[Tensor, int, int], ...]
    bias: Tensor
    scale: float
    workspace_bytes: int

    @classmethod
    def prepare(
        cls,
        pattern: LearnedPattern,
        geometry: Geometry,
        *,
        scale: float,
        device: torch.device,
        dtype: torch.dtype,
        workspace_bytes: int,
    ) -> DynamicTables:
        """Sort the block rows of `geometry` and draw its masks."""
        bias = torch.where(masks_of(geometry, pattern.block_size), 0.0, -math.inf)
        bias = bias.to(device, accumulator_dtype(dtype))
        groups = tuple((rows.to(device), cut, whole) for rows, cut, whole in _groups(pattern, geometry))
        return cls(geometry, pattern.block_size, groups, bias, scale, workspace_bytes)

    @property
    def nbytes(self) -> int:
        """Memory that rows and masks occupy."""
        return self.bias.nbytes + sum(256 + rows.nbytes for rows, _, _ in self.groups)

    def bind(self, tables: Tensor) -> BlockProduct:
        """The product over `tables` (B, H, R, k) int64, in whose rows the blocks that the diagonal cuts come first."""
        return BlockProduct(
            block_size=self.block_size,
            classes=tuple(self._classes(tables)),
            bias=self.bias,
            scale=self.scale,
            workspace_bytes=self.workspace_bytes,
            one_index=True,
        )

    def _classes(self, tables: Tensor) -> Iterator[ItemClass]:
        """Items counted over (batch, head, row), keys over (batch, key-value head, column)."""
        batch, heads, q_rows, _ = tables.shape
        geometry = self.geometry
        k_rows = -(-geometry.kv_len // self.block_size)
        device = tables.device
        item = torch.arange(batch * heads, device=device).view(batch, heads, 1) * q_rows
        kv_head = torch.arange(heads, device=device) // geometry.group_size
        base = torch.arange(batch, device=device)[:, None] * geometry.num_kv_heads + kv_head
        base = (base * k_rows).view(batch, heads, 1, 1)
        for rows, cut, whole in self.groups:
            blocks = tables[:, :, :, : cut + whole].index_select(2, rows)
            masks = mask_kinds(geometry, self.block_size, rows[:, None], blocks[..., :cut])
            yield ItemClass(
                (item + rows).flatten(), (base + blocks).flatten(0, 2), masks.flatten(0, 2), log_weights=None
            )


def mask_kinds(geometry: Geometry, size: int, rows: Tensor, blocks: Tensor) -> Tensor:
    """Which of `masks_of` belongs to blocks of keys for rows of blocks, by their positions."""
    kinds = torch.full_like(blocks, KINDS - 1)
    if geometry.is_causal:
        apart = (geometry.q_offset - geometry.kv_offset) // size + rows - blocks
        kinds = apart.clamp(-2, 1) + 2
    return kinds + KINDS * (blocks == (geometry.kv_len - 1) // size)


def dynamic_pairs(pattern: LearnedPattern, geometry: Geometry) -> int:
    """Pairs over all query heads of a batch row, however the gate chooses.

    Where it may choose the short last block (attention that is not causal), that block is counted as a whole one.
    """
    size, shift = pattern.block_size, geometry.q_offset - geometry.kv_offset
    if not (geometry.q_len and geometry.kv_len):
        return 0
    of = TableRows.of(
        pattern, geometry.q_len, geometry.kv_len, shift, is_causal=geometry.is_causal, device=torch.device("cpu")
    )
    query = torch.arange(geometry.q_len, device="cpu")
    row = query // size
    whole = (of.kept - (of.visible - of.before))[row] * size
    cut = (query + shift + 1).clamp(max=geometry.kv_len) - of.before[row] * size
    seen = whole + torch.where((of.visible > of.before)[row], cut.clamp(min=0), 0)
    return int(seen.sum()) * geometry.num_heads


def kept_blocks(pattern: LearnedPattern, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """How many blocks each row keeps that a mask cuts, and how many that none does; both (R,) int64 on the CPU.

    All are cut where the short last block may be among them.
    """
    size, shift = pattern.block_size, geometry.q_offset - geometry.kv_offset
    of = TableRows.of(
        pattern,
        geometry.q_len,
        geometry.kv_len,
        shift,
        is_causal=geometry.is_causal,
        device=torch.device("cpu"),
    )
    reaches_end = (of.before == -(-geometry.kv_len // size)) & (geometry.kv_len % size != 0)
    cut = torch.where(reaches_end, of.kept, of.visible - of.before)
    return cut, of.kept - cut


def _groups(pattern: LearnedPattern, geometry: Geometry) -> Iterator[tuple[Tensor, int, int]]:
    """Rows with equal numbers of cut and uncut blocks."""
    kinds, kind = torch.unique(torch.stack(kept_blocks(pattern, geometry), dim=1), dim=0, return_inverse=True)
    for number, (n_cut, n_whole) in enumerate(kinds.tolist()):
        if n_cut + n_whole:
            yield torch.nonzero(kind == number).squeeze(1), n_cut, n_whole


def masks_of(geometry: Geometry, size: int) -> Tensor:
    """The (2 * KINDS, b, b) masks; query i and key j of one are `distance` + i - j positions apart.

    First the kinds of blocks against the diagonal, then the same for the last block of keys.
    """
    shift = (geometry.q_offset - geometry.kv_offset) % size
    place = torch.arange(size, device="cpu")
    apart = place[:, None] - place
    sees = torch.stack([apart + distance >= 0 for distance in (-size, shift - size, shift, size)])
    ends = (geometry.kv_len - 1) % size + 1
    return torch.cat([sees, sees & (place < ends)])
