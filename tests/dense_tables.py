"""Tables of blocks as the dense counts that they stand for."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dilated_attention.core.layout import BlockLayout

Dense = NDArray[np.int64]  # (H, S, T)


def dense_blocks(blocks: BlockLayout) -> Dense:
    """Blocks pasted where the tables say, with the documented invariants checked on the way."""
    geometry, b = blocks.geometry, blocks.block_size
    rows = -(-geometry.q_len // b)
    canvas = np.zeros((geometry.num_heads, rows * b, -(-geometry.kv_len // b) * b), dtype=np.int64)
    assert blocks.row_ptr.shape[1] == rows + 1
    assert blocks.row_ptr[-1, -1] == blocks.cols.size == blocks.weights.size == blocks.mask_ids.size
    for h, table in enumerate(blocks.head_table):
        for i in range(rows):
            begin, end = blocks.row_ptr[table, i], blocks.row_ptr[table, i + 1]
            assert (np.diff(blocks.cols[begin:end]) > 0).all()
            for e in range(begin, end):
                c, weight, mask_id = int(blocks.cols[e]), int(blocks.weights[e]), int(blocks.mask_ids[e])
                assert (weight > 0) != (mask_id >= 0)
                if weight:
                    assert (c + 1) * b <= geometry.kv_len, "a full block reaches beyond the keys"
                elif i * b + b > geometry.q_len:
                    assert not blocks.masks[mask_id][geometry.q_len - i * b :].any()
                tile = weight if weight else blocks.masks[mask_id].astype(np.int64)
                canvas[h, i * b : i * b + b, c * b : c * b + b] += tile
    assert not canvas[:, :, geometry.kv_len :].any()
    assert all(mask.any() for mask in blocks.masks)
    assert len({mask.tobytes() for mask in blocks.masks}) == len(blocks.masks)
    return canvas[:, : geometry.q_len, : geometry.kv_len]
