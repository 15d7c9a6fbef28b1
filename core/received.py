"""How much attention each key receives: the column sums of the attention weights, piece by piece.

Shapes: B batch, S query length, T key length, H query heads, K key-value heads, D head_dim; a piece is a stack of N
rectangles of R rows and C columns, G query heads to a key-value head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from .limits import at_once
from .merging import accumulator_dtype, by_rows
from .schedule import Call, Schedule
from .slabs import slabs_of

_TILE = 512  # rows and columns of scores formed at once, at most


def received_from(
    query: Tensor, key: Tensor, lse: Tensor, schedule: Schedule, *, scale: float, workspace_bytes: int
) -> Tensor:
    """Sum over queries of m(p, q) exp(s_pq - lse_p), over the pairs of a schedule, in tiles.

    Args:
        query: (B, S, H, D).
        key: (B, T, K, D).
        lse: (B, H, S), in the accumulator's dtype; +inf in rows without keys.
        schedule: dense pieces; pairs outside them count nothing.
        scale: factor on q·k.
        workspace_bytes: bound on the temporaries of a tile.

    Returns:
        (B, H, T), in the accumulator's dtype.
    """
    batch, kv_len, heads = query.shape[0], key.shape[1], query.shape[2]
    dtype = accumulator_dtype(query.dtype)
    # Rows before heads in memory, so that segments stack over the batch as those of query and key do.
    total = torch.zeros(batch, kv_len, heads, dtype=dtype, device=query.device).transpose(1, 2)
    lse = by_rows(lse)
    for call in schedule.calls:
        places = attrs.evolve(  # where the keys of each query head stand
            call.key, head=call.query.head, head_step=call.query.head_step, num_heads=call.query.num_heads
        )
        low, high = call.distances
        for slab in slabs_of(call, (query,), (key,)):
            q, k = slab.view(query, call.query), slab.view(key, call.key)
            lse_part, total_part = slab.view_lse(lse, call.query), slab.view_lse(total, places)
            for n, rows, cols in _tiles(call, q, workspace_bytes):
                scores = _scores(q[n, rows], k[n, cols], scale).sub_(lse_part[n, :, rows].unsqueeze(-1))
                nearest, farthest = cols.start - rows.stop + 1, cols.stop - 1 - rows.start
                if nearest < low or farthest > high:
                    row = torch.arange(rows.start, rows.stop, device=scores.device)
                    distance = torch.arange(cols.start, cols.stop, device=scores.device) - row[:, None]
                    scores.masked_fill_((distance < low) | (distance > high), -math.inf)
                total_part[n, :, cols] += scores.exp_().sum(dim=2).mul_(call.weight)
    return total


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scaled products (N, H, R, C) of query (N, R, H, D) and key (N, C, K, D), formed in the accumulator's dtype."""
    dtype, (count, rows, heads, _) = accumulator_dtype(query.dtype), query.shape
    kv_heads = key.shape[2]
    q = torch.unflatten(query.to(dtype), 2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k = key.to(dtype).permute(0, 2, 3, 1)
    return (q @ k).mul_(scale).view(count, heads, rows, key.shape[1])


def _tiles(call: Call, query: Tensor, workspace_bytes: int) -> Iterator[tuple[slice, slice, slice]]:
    """Rectangles, rows and columns to be formed at once, of those that the call's distances reach."""
    count, rows, heads, _ = query.shape
    cols, (low, high) = call.key.count, call.distances
    each = 2 * accumulator_dtype(query.dtype).itemsize * heads  # scores, and their copy while they fill
    pairs = at_once(workspace_bytes, query) // each
    tile = max(1, min(_TILE, math.isqrt(pairs)))
    step = max(1, pairs // (min(tile, rows) * min(tile, cols)))
    for n in range(0, count, step):
        for i in range(0, rows, tile):
            stop = min(rows, i + tile)
            for j in range(max(0, i + low), min(cols, stop + high), tile):
                yield slice(n, n + step), slice(i, stop), slice(j, min(cols, stop + high, j + tile))
