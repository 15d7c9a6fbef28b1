"""Full attention's weights summed over blocks of keys: what a gate learns from, formed a few blocks at a time.

Shapes as in `_gate`; t blocks of keys and n rows of blocks of queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ..core.merging import accumulator_dtype

if TYPE_CHECKING:
    from ..core.config import AttentionConfig


def block_weights(
    query: Tensor, key: Tensor, shift: int, config: AttentionConfig, size: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of blocks and their weights (B, H, n, b, C), for n rows at a time.

    They are formed from the log-sum-exp of each block, so that a tile of scores is dropped as soon as it has been
    seen. Queries past the end have the weight 0, as those without keys.

    Args:
        query: (B, S, H, D).
        key: (B, T, K, D).
        shift: how far the first query stands after the first key.
        config: heads, scale, causality and `Limits.workspace_bytes`, within which tiles are.
        size: b.
    """
    dtype = accumulator_dtype(query.dtype)
    (batch, length, heads, _), kv_len = query.shape, key.shape[1]
    queries = functional.pad(query.to(dtype).transpose(1, 2), (0, 0, 0, -length % size))
    queries = torch.unflatten(queries, 1, (config.kv_heads, -1))
    keys = functional.pad(key.to(dtype).transpose(1, 2), (0, 0, 0, -kv_len % size))
    cols = keys.shape[2] // size
    budget = config.limits.workspace_bytes // (4 * dtype.itemsize * batch * heads * size)
    step = max(1, budget // max(cols, size))
    tile = max(1, budget // (step * size))
    for begin in range(0, queries.shape[3] // size, step):
        rows = slice(begin, min(begin + step, queries.shape[3] // size))
        place = torch.arange(rows.start * size, rows.stop * size, device=query.device)
        part = queries[:, :, :, rows.start * size : rows.stop * size]
        seen = min(cols, max(1, rows.stop + shift // size + 1)) if config.is_causal else cols
        logs = []
        for c in range(0, seen, tile):
            first, end = c * size, min(c + tile, seen) * size
            of_first = None if not config.is_causal else place + shift - first
            logs.append(_block_logs(part, keys[:, :, first:end], of_first, kv_len - first, config.softmax_scale, size))
        per_block = functional.pad(torch.cat(logs, dim=-1), (0, cols - seen), value=-torch.inf)
        total = per_block.logsumexp(dim=-1, keepdim=True)
        weights = torch.exp(per_block - torch.where(total == -torch.inf, 0.0, total))
        weights = weights * (place < length)[:, None]
        yield rows, torch.unflatten(weights.flatten(1, 2), 2, (-1, size))


def _block_logs(query: Tensor, key: Tensor, position: Tensor | None, kv_len: int, scale: float, size: int) -> Tensor:
    """Log-sum-exp of the scores of query (B, K, G, n, D) with each block of key (B, K, t * b, D): (B, K, G, n, t).

    `position` (n,) are the positions of causal queries counted from the first of these keys, of which kv_len are real.
    """
    scores = (query.flatten(2, 3) @ key.mT).mul_(scale)
    scores = torch.unflatten(scores, 2, query.shape[2:4])
    place = torch.arange(key.shape[2], device=key.device)
    sees = place < kv_len
    if position is not None:
        sees = sees & (place <= position[:, None])
    scores.masked_fill_(~sees, -torch.inf)
    return torch.unflatten(scores, -1, (-1, size)).logsumexp(dim=-1)
