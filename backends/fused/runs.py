"""The runs of tiles of rows: what each meets of each walk in each segment, listed before anything is computed.

A kernel then goes through all columns of a tile in one loop, whose loads are under way across the ends of runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.supports import ranges
from ..libraries import FP_FUSION
from .block_tables import moved
from .run_kernels import list_runs
from .tiles import Tile, ceil_div
from .walks import Tables

if TYPE_CHECKING:
    from ...core.documents import Packing


@attrs.frozen(eq=False)
class Runs:
    """The runs of all tiles of rows of one size.

    Shapes: N kinds of heads, P period, T blocks of P tiles, R places for the runs of a block.

    Attributes:
        blocks: T.
        origin: the position that tiles are counted from.
        block_runs: R.
        start: (N, P) int32, where in its block's places each tile's begin.
        runs: (N, T, R, 4) int32: the walk, its segment, the columns that some row of the tile meets, and those that
            every row does.
        totals: (N, T, P) int32, steps of a tile of columns that the runs take.
        documents: (T, 8) int32, as `documents_of` gives them, or nothing where all blocks are of one sequence.
    """

    blocks: int
    origin: int
    block_runs: int
    start: Tensor
    runs: Tensor
    totals: Tensor
    documents: Tensor

    @classmethod
    def of(
        cls,
        tables: DeviceTables,
        tile: Tile,
        rows: tuple[int, int],
        columns: tuple[int, int],
        documents: NDArray[np.int32] | None = None,
    ) -> Runs:
        """List them for rows and columns at these positions (from, up to); of documents, no farther than these."""
        host, device = tables.host, tables.counts.device
        kinds = host.counts.shape[0]
        origin = rows[0] // host.period * host.period
        blocks = ceil_div(rows[1] - origin, tile.rows * host.period) if documents is None else len(documents)
        start, block_runs = host.places_of_runs(tile.rows, rows[1] - rows[0])
        made = cls(
            blocks,
            origin,
            block_runs,
            moved(start, device),
            torch.empty((kinds, blocks, block_runs, 4 + 2 * tile.parts), dtype=torch.int32, device=device),
            torch.empty((kinds, blocks, host.period, 1 + tile.parts), dtype=torch.int32, device=device),
            torch.empty((0, 8), dtype=torch.int32, device=device) if documents is None else moved(documents, device),
        )
        list_runs[(blocks * host.period, kinds)](
            *tables.rows,
            tables.walks,
            tables.counts,
            made.start,
            made.runs,
            made.totals,
            made.documents,
            *rows,
            *columns,
            origin,
            *host.sizes,
            blocks,
            block_runs,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            SHIFTS=host.shifts,
            PARTS=tile.parts,
            PACKED=documents is not None,
            **FP_FUSION,
        )
        return made

    @property
    def nbytes(self) -> int:
        """Memory on the device."""
        return sum(x.nbytes for x in (self.start, self.runs, self.totals, self.documents))


def documents_of(packing: Packing, positions: int, period: int, *, transposed: bool) -> NDArray[np.int32]:
    """The document of each block of tiles, which has rows at so many `positions` from a multiple of `period` on.

    Returns (T, 8): its batch row, the places of its first row and its first column in there, the positions from and up
    to which it has rows, likewise columns, and the position that this block's are counted from.
    """
    row, q_start, q_len, kv_start, kv_len = packing.places.T
    queries, keys = (q_start, kv_len - q_len, kv_len), (kv_start, np.zeros_like(kv_len), kv_len)
    (first, low, high), columns = (keys, queries) if transposed else (queries, keys)
    origin = low // period * period
    blocks = -((origin - high) // positions)
    fields = np.stack([row, first, columns[0], low, high, *columns[1:], origin], axis=1).repeat(blocks, axis=0)
    fields[:, 7] += positions * ranges(np.zeros_like(blocks), blocks)
    return fields.astype(np.int32)


@attrs.frozen(eq=False)
class DeviceTables:
    """`Tables` where the kernels read them; `rows` are those by which they find the rows of a tile."""

    host: Tables
    head_kind: Tensor
    rows: tuple[Tensor, ...]
    walks: Tensor
    bias: Tensor
    counts: Tensor

    @classmethod
    def of(cls, host: Tables, device: torch.device) -> DeviceTables:
        """Move them to the device."""
        rows = (host.slot_group, host.slot_index, host.group_size, host.group_start, host.residues)
        read = (host.head_kind, *rows, host.walks, host.bias, host.counts)
        head_kind, *rows_read, walks, bias, counts = (moved(array, device) for array in read)
        return cls(host, head_kind, tuple(rows_read), walks, bias, counts)

    @property
    def nbytes(self) -> int:
        """Memory on the device."""
        return sum(x.nbytes for x in (self.head_kind, *self.rows, self.walks, self.bias, self.counts))
