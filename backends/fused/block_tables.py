"""Tables of blocks as the kernels read them: by rows for queries, by columns for keys, blocks with a mask last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.counting import entry_rows, entry_tables
from ...core.layout import BlockLayout
from ...core.supports import ranges

if TYPE_CHECKING:
    from ...core.geometry import Geometry


_MANY: Final = 4  # times as many blocks as a row has on average: a program for them ends long after the others


def moved(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """On the device, without waiting for what is queued there."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@attrs.frozen(eq=False)
class BlockTables:
    """One direction of a `BlockLayout` on a device.

    Shapes: H heads, T tables, R block rows (of keys where transposed), E blocks, M masks, b block size.

    Attributes:
        block_size: b.
        block_rows: R.
        tensors: head_table (H,) int32; starts (2·T·R + 1,) int32, where each row's blocks and, among them, those with a
            mask begin; cols (E,) int32; biases (E,) float32, binary logarithm of the weight; mask_ids (E,) int32, -1
            without a mask; masks (M, 2, b, b / 32) int32, 32 pairs in a number, the first in its lowest bit: the keys
            of each query, and the queries of each key. A block whose pairs count differently stands there once for each
            weight; where occurrences are apart, once for each of those, whose number is then in the place of its bias.
        batch_tables: 0; or H where every batch row has tables of its own, and head_table is (B·H,).
        packed: where the block rows of documents are, and where their blocks end (see `packed_blocks`), or None.
        programs: block rows that are computed; R but for documents.
        blocks: E, where that is known; the tensors have 1 for none.
        leading: the first block rows that have many times as many blocks as most, as where keys are seen by everyone:
            what begins with them does not end with them.
        occurrences: the most of a pair, where they are apart.
    """

    block_size: int
    block_rows: int
    tensors: tuple[Tensor, ...]
    batch_tables: int = 0
    packed: tuple[Tensor, Tensor] | None = None
    programs: int = attrs.field(default=attrs.Factory(lambda self: self.block_rows, takes_self=True))
    blocks: int | None = None
    leading: int = 0
    occurrences: int = 1

    @classmethod
    def of(
        cls,
        layout: BlockLayout,
        device: torch.device,
        *,
        transposed: bool,
        in_order: bool = False,
        apart: bool = False,
    ) -> BlockTables:
        """Sort the blocks by table, row and whether they have a mask, their occurrences `apart` if told so.

        Where they are to be `in_order` of their columns they are not told apart by that, and starts is (T·R + 1,).
        """
        tables, rows = layout.row_ptr.shape[0], layout.row_ptr.shape[1] - 1
        table, row, col = entry_tables(layout), entry_rows(layout), layout.cols.astype(np.int64)
        ids, masks = _with_edges(layout, row, col)
        planes = Planes.of(masks)
        often = np.where(ids < 0, 1, planes.count[ids])
        each, plane = np.arange(len(ids)).repeat(often), ranges(planes.first[ids], often)  # the block of each plane
        table, row, col, ids = table[each], row[each], col[each], ids[each]
        plane = np.where(ids < 0, -1, plane)
        weights = np.where(ids < 0, layout.weights[each], planes.weights[plane])
        biases, occurrences = np.log2(weights), 1
        if apart:
            occurrences = int(weights.max(initial=1))
            each, biases = np.arange(len(ids)).repeat(weights), ranges(np.zeros_like(weights), weights)
            table, row, col, plane = table[each], row[each], col[each], plane[each]
        if transposed:
            row, col = col, row
            rows = -(-layout.geometry.kv_len // layout.block_size)
        key = table * rows + row if in_order else 2 * (table * rows + row) + (plane >= 0)
        order = np.argsort(key, kind="stable")
        starts = np.searchsorted(key[order], np.arange((1 if in_order else 2) * tables * rows + 1))
        arrays: tuple[NDArray[np.generic], ...] = (
            layout.head_table,
            starts.astype(np.int32),
            col[order].astype(np.int32),
            biases[order].astype(np.float32),
            plane[order].astype(np.int32),
            planes.bits,
        )
        padded = [array if array.size else np.zeros(1, dtype=array.dtype) for array in arrays]
        tensors = tuple(moved(np.array(array), device) for array in padded)
        of_row = np.bincount(table * rows + row, minlength=tables * rows).reshape(tables, rows).max(axis=0)
        leading = int(np.argmin(np.append(of_row > _MANY * max(1.0, of_row.mean()), False)))
        return cls(layout.block_size, rows, tensors, blocks=len(order), leading=leading, occurrences=occurrences)


# Of each table of blocks that is alive: what kernels read of it, by device, direction, order, and if occurrences are
# apart.
_KNOWN: WeakKeyDictionary[BlockLayout, dict[tuple[torch.device, bool, bool, bool], BlockTables]] = WeakKeyDictionary()


def known_blocks(
    layout: BlockLayout, device: torch.device, *, transposed: bool, in_order: bool = False, apart: bool = False
) -> BlockTables:
    """`BlockTables.of` these, made once."""
    known, kind = _KNOWN.setdefault(layout, {}), (device, transposed, in_order, apart)
    if kind not in known:
        known[kind] = BlockTables.of(layout, device, transposed=transposed, in_order=in_order, apart=apart)
    return known[kind]


@attrs.frozen(eq=False)
class KnownBlocks:
    """Both directions of a `BlockLayout` on a device: `launches.Blocks` of tables that are never named anew.

    Attributes:
        geometry: of the layout.
        block_size: b.
        pairs: that the layout counts.
        by_rows: for queries.
        by_columns: for keys.
    """

    geometry: Geometry
    block_size: int
    pairs: int
    by_rows: BlockTables
    by_columns: BlockTables

    @classmethod
    def of(cls, layout: BlockLayout, device: torch.device, *, apart: bool = False) -> KnownBlocks:
        """Of all its blocks, their occurrences `apart` if told so."""
        by_rows, by_columns = (known_blocks(layout, device, transposed=side, apart=apart) for side in (False, True))
        return cls(layout.geometry, layout.block_size, layout.pairs, by_rows, by_columns)

    @property
    def nbytes(self) -> int:
        """Memory of both, each tensor once."""
        read = (x for tables in (self.by_rows, self.by_columns) for x in (*tables.tensors, *(tables.packed or ())))
        return sum(x.nbytes for x in {id(x): x for x in read}.values())

    @property
    def occurrences(self) -> int:
        """The most of a pair, where they are apart."""
        return self.by_rows.occurrences

    def tables(self, named: Tensor | None, *, transposed: bool) -> BlockTables:
        """One of them."""
        assert named is None
        return self.by_columns if transposed else self.by_rows


@attrs.frozen(eq=False)
class Planes:
    """Masks of multiplicities, told apart by weight: what pairs of a mask count so much are a plane.

    Attributes:
        bits: (P, 2, b, b / 32) int32, the planes as `BlockTables` has masks.
        weights: (P,) int32, theirs.
        first: (M + 1,) int64, the first plane of each mask.
        count: (M + 1,) int64, how many it has.
    """

    bits: NDArray[np.int32]
    weights: NDArray[np.int32]
    first: NDArray[np.int64]
    count: NDArray[np.int64]

    @classmethod
    def of(cls, masks: NDArray[np.uint8]) -> Planes:
        """Of masks (M, b, b)."""
        planes, weights, count = [], [], np.zeros(len(masks) + 1, dtype=np.int64)
        for i, mask in enumerate(masks):
            values = np.flatnonzero(np.bincount(mask.ravel()))
            planes += [mask == value for value in values if value]
            weights += [value for value in values if value]
            count[i] = np.count_nonzero(values)
        met = np.array(planes, dtype=bool).reshape(-1, *masks.shape[1:])
        return cls(bits_of(met), np.array([*weights, 1], dtype=np.int32), count.cumsum() - count, count)


def bits_of(met: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Masks (M, b, b) of queries and keys as `BlockTables` has them, (M, 2, b, b / 32) rounded up."""
    size = met.shape[-1]
    both = np.stack([met, met.transpose(0, 2, 1)], axis=1)
    whole = np.zeros((*both.shape[:-1], -(-size // 32) * 32), dtype=bool)
    whole[..., :size] = both
    return np.packbits(whole, axis=-1, bitorder="little").view("<i4").astype(np.int32)


def _with_edges(
    layout: BlockLayout, row: NDArray[np.int64], col: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Mask ids and masks, with one for each full block that reaches past an end of the queries or keys."""
    size, geometry = layout.block_size, layout.geometry
    rows = np.minimum(geometry.q_len - row * size, size)
    cols = np.minimum(geometry.kv_len - col * size, size)
    ids, masks = layout.mask_ids.copy(), [layout.masks]
    edges = np.flatnonzero((ids < 0) & ((rows < size) | (cols < size)))
    kinds, kind = np.unique(
        np.stack([rows[edges], cols[edges], layout.weights[edges]], axis=1), axis=0, return_inverse=True
    )
    ids[edges] = len(layout.masks) + kind.ravel()
    for r, c, weight in kinds:
        mask = np.zeros((1, size, size), dtype=np.uint8)
        mask[0, :r, :c] = weight
        masks.append(mask)
    return ids, np.concatenate([mask.reshape(-1, size, size) for mask in masks])
