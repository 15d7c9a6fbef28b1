"""FlashAttention-4 as a baseline: its tables where all blocks of 128 are full ones, and its sliding windows.

    dilated-attention bench --case 'random-32k-*' --backend triton --peer benchmarks.fa4_tables:tables
    dilated-attention bench --case 'local-128k*' --backend triton --peer benchmarks.fa4_tables:windows

The tables are made beforehand; needs flash-attn-4 and an sm_90 card.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dilated_attention import Local
from dilated_attention.bench.cases import BenchCase
from dilated_attention.bench.peers import Peer
from dilated_attention.core.layout import BlockLayout
from dilated_attention.core.lowering import lower

if TYPE_CHECKING:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

BLOCK = 128  # the tiles of its backward take no smaller ones


def tables(case: BenchCase, device: str) -> Peer | None:
    """The peer for a case that lowers to nothing but full blocks of 128, each counted once."""
    layout = lower(case.pattern, case.geometry)
    blocks = layout.blocks
    if blocks is None or layout.branches or blocks.block_size != BLOCK or case.seq_len % BLOCK or case.is_causal:
        return None
    if (blocks.weights != 1).any():
        return None
    by_rows, by_columns = (listed(blocks, device, transposed=side) for side in (False, True))

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = _Attend.apply(query, key, value, by_rows, by_columns)  # type: ignore[no-untyped-call, unused-ignore]
        return out

    return Peer("FA4 block tables", attend, kernel="flash-attn-4")


def windows(case: BenchCase, device: str) -> Peer | None:
    """The peer for a causal case in which each query sees a window of keys that ends with its own."""
    if not (isinstance(case.pattern, Local) and case.is_causal):
        return None
    from flash_attn.cute.interface import flash_attn_func

    window = case.pattern.window_size

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = flash_attn_func(query, key, value, causal=True, window_size=window)[0]
        return out

    return Peer("FA4 windows", attend, kernel="flash-attn-4")


def listed(blocks: BlockLayout, device: str, *, transposed: bool) -> BlockSparseTensorsTorch:
    """Its tables: for each head and row of blocks (of keys, where transposed) how many blocks it meets, and which."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    rows = blocks.row_ptr.shape[1] - 1
    counts: list[NDArray[np.int32]] = []
    columns: list[list[NDArray[np.int32]]] = []
    for table in blocks.head_table:
        ends = blocks.row_ptr[table]
        row = np.repeat(np.arange(rows, dtype=np.int32), np.diff(ends))
        column = blocks.cols[ends[0] : ends[-1]]
        if transposed:
            order = np.argsort(column, kind="stable")
            row, column = column[order], row[order]
        found = np.bincount(row, minlength=rows).astype(np.int32)
        counts.append(found)
        columns.append(np.split(column, np.cumsum(found)[:-1]))
    indices = np.zeros((1, len(counts), rows, max(1, *(len(c) for head in columns for c in head))), dtype=np.int32)
    for head, each in enumerate(columns):
        for number, column in enumerate(each):
            indices[0, head, number, : len(column)] = column
    full_counts = torch.from_numpy(np.stack(counts)[None]).to(device)
    return BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(full_counts),
        mask_block_idx=torch.zeros((*full_counts.shape, 1), dtype=torch.int32, device=device),
        full_block_cnt=full_counts,
        full_block_idx=torch.from_numpy(indices).to(device),
        block_size=(BLOCK, BLOCK),
    )


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, by_rows: Any, by_columns: Any) -> Tensor:
        from flash_attn.cute.interface import _flash_attn_fwd

        scale = query.shape[-1] ** -0.5
        out, lse, *_ = _flash_attn_fwd(
            query, key, value, softmax_scale=scale, block_sparse_tensors=by_rows, return_lse=True
        )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale, ctx.by_columns = scale, by_columns
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from flash_attn.cute.interface import _flash_attn_bwd

        query, key, value, out, lse = ctx.saved_tensors
        grads = _flash_attn_bwd(
            query, key, value, out, dout, lse, softmax_scale=ctx.scale, block_sparse_tensors=ctx.by_columns
        )
        return (*grads, None, None)
