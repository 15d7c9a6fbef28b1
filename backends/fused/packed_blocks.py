"""Tables of blocks of all documents of a call: one table serves them all, each as far as it goes.

What a query of a document sees depends on its position alone, so block row i of a document lists what block row i of
the table lists. Where attention is causal, nothing of that is behind the document's end. Keys are seen from queries
behind them, so of their blocks a document has only the first ones, in the order of their queries, and of the last of
these perhaps only the first rows; where attention is not causal, that is so of queries too. Nothing is listed anew for
a document but where its rows of blocks are, and where their blocks end.

Shapes: R block rows of all documents, T tables, E blocks, b block size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch
from torch import Tensor

from ...core.supports import ranges
from .block_tables import BlockTables, KnownBlocks, known_blocks, moved

if TYPE_CHECKING:
    from ...core.documents import Packing
    from ...core.layout import BlockLayout


def packed_blocks(layout: BlockLayout, packing: Packing, device: torch.device, *, apart: bool) -> KnownBlocks:
    """The tables for documents with as many queries as keys; `layout` is of a sequence no shorter than any."""
    row, start, length, _, _ = packing.places.T
    rows = -(-length // layout.block_size)
    fields = np.stack([row, start, length], axis=1).repeat(rows, axis=0)
    fields = np.insert(fields, 2, ranges(np.zeros_like(rows), rows), axis=1)
    is_causal = layout.geometry.is_causal
    by_rows = known_blocks(layout, device, transposed=False, in_order=not is_causal, apart=apart)
    by_columns = known_blocks(layout, device, transposed=True, in_order=True, apart=apart)
    leads = fields[:, 2] < by_columns.leading
    documents = moved(np.concatenate([fields[leads], fields[~leads]]).astype(np.int32), device)
    programs, leading = len(fields), int(leads.sum())
    ends = _ends(by_columns, layout, documents)
    ends_of_rows = ends if is_causal else _ends(by_rows, layout, documents)  # else not read
    return KnownBlocks(
        layout.geometry,
        layout.block_size,
        layout.pairs,
        attrs.evolve(by_rows, packed=(ends_of_rows, documents), programs=programs, leading=0 if is_causal else leading),
        attrs.evolve(by_columns, packed=(ends, documents), programs=programs, leading=leading),
    )


def _ends(listed: BlockTables, layout: BlockLayout, documents: Tensor) -> Tensor:
    """(T, R) int32, where the blocks of a row that is listed in order end in its document."""
    starts, cols = listed.tensors[1].long(), listed.tensors[2][: listed.blocks].long()
    tables, rows = layout.row_ptr.shape[0], listed.block_rows
    # Each list after the other, the blocks of all are one ascending sequence of numbers.
    of_block = torch.repeat_interleave(starts.diff(), output_size=len(cols)) * (rows + 1) + cols
    of_row = torch.arange(tables, device=documents.device)[:, None] * rows + documents[:, 2]
    behind = (documents[:, 3].long() + layout.block_size - 1) // layout.block_size
    return torch.searchsorted(of_block, of_row * (rows + 1) + behind, out_int32=True)
