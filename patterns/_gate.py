"""The gate of learned attention: which key blocks a block of queries keeps, and how that is learned.

Shapes: B batch, S query length, T key length, H query heads, K key-value heads, G = H / K, D head_dim, b block size,
R blocks of queries, C blocks of keys. Tensors of the public methods are laid out as the configuration's
`tensor_layout` says; inside they are (B, S, H, D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.dynamic_tables import TableRows
from ..core.errors import ConfigError
from ..core.gate import Gate
from ..core.geometry import Geometry
from ..core.merging import accumulator_dtype
from ..core.ops import without_autocast

if TYPE_CHECKING:
    from ..core.config import AttentionConfig
    from ..core.pattern import LearnedPattern
    from ._stored_blocks import FrozenBlocks

_SIGNS = 2  # every direction is looked along both ways: a large component tells as much as a very negative one


class BlockGate(Gate):
    """Scores key blocks for blocks of queries and keeps the best; `Learned` says what each may see.

    The score is scale * sum_f relu(q · Q_f + c_f) * log mean_j exp(k_j · K_f) + w · g(distance), over learned
    directions f of a summary q of the queries and of the keys k_j, which are pooled over the block once they are
    projected; g are the logarithm and the inverse of the distance in blocks. Pooling by the logarithm of the mean
    exponential lets one key count that the block's mean would drown; how sharply, the length of K_f says. It begins
    along the axes and against them: for small keys that is the product of summary and mean key, for large ones the
    bound of Quest (arXiv 2406.10774). Pooling keys and queries per block and training against the pooled attention map
    follow SeerAttention (arXiv 2410.13276).

    Args:
        pattern: what each row of blocks may see and keeps.
        config: heads, scale, causality, dtype and device.
        most: how many blocks a row keeps that may see a given number of them.

    Attributes:
        query_mix: (H, D, 2 D), the columns Q_f.
        query_bias: (H, 2 D), c.
        key_mix: (K, D, 2 D), the columns K_f.
        nearness: (H, 2), or (H, 4) where blocks may lie on both sides: w.
    """

    def __init__(self, pattern: LearnedPattern, config: AttentionConfig, most: Callable[[int], int]) -> None:
        super().__init__()
        self._pattern = pattern
        self._words = repr(pattern)  # torch.compile cannot trace attrs' own repr, which torch.func.vmap asks for
        self._most = most
        self._config = config
        self._dtype = accumulator_dtype(getattr(torch, config.dtype))
        heads, kv_heads, dim = config.num_heads, config.kv_heads, config.head_dim
        eye = torch.eye(dim, dtype=self._dtype, device=config.device)
        axes = torch.cat([eye, -eye], dim=1)
        self.query_mix = nn.Parameter(axes.repeat(heads, 1, 1))
        self.query_bias = nn.Parameter(eye.new_zeros(heads, _SIGNS * dim))
        self.key_mix = nn.Parameter(axes.repeat(kv_heads, 1, 1))
        sides = 1 if config.is_causal else 2
        self.nearness = nn.Parameter(eye.new_zeros(heads, 2 * sides))

    def extra_repr(self) -> str:
        """The pattern that it chooses for."""
        return self._words

    def forward(self, query: Tensor, key: Tensor, *, q_offset: int = 0, kv_offset: int = 0) -> Tensor:
        """As `Gate.forward`."""
        with torch.no_grad():
            shift = q_offset - kv_offset
            return self._choose(self._scores(query, key, shift), query.shape[1], key.shape[1], shift)

    def distillation_loss(
        self, query: Tensor, key: Tensor, *, q_offset: int | None = None, kv_offset: int = 0
    ) -> Tensor:
        """How far the scores are from the attention that full attention would pay to each block.

        The mean over batch rows, heads and blocks of queries of KL(p || softmax(scores)), p being the attention
        weights of full (causal) attention, summed over the queries and the keys of a pair of blocks and normalised
        over the blocks that can be chosen: the target of SeerAttention (arXiv 2410.13276, there the largest weight
        instead of their sum) with the loss of DeepSeek-V3.2's warm-up of its sparse-attention indexer (KL to the summed
        and L1-normalised attention). Only the gate learns from it: query and key are detached.

        Weights are formed for a few blocks of queries and keys at a time, within `Limits.workspace_bytes`, and only
        their sums over pairs of blocks are kept.

        Args:
            query: as attention gets it.
            key: as attention gets it.
            q_offset: absolute position of the first query; default: the last query stands at the last key.
            kv_offset: absolute position of the first key.

        Returns:
            A scalar in nats, float32 (float64 for float64); 0 where no block of queries has a choice.
        """
        query, key, shift = self._inputs(query, key, q_offset, kv_offset)
        with without_autocast(query.device):
            return self._divergence(query, key, shift)

    def _divergence(self, query: Tensor, key: Tensor, shift: int) -> Tensor:
        """`distillation_loss` of query (B, S, H, D) and key (B, T, K, D)."""
        scores = self._scores(query, key, shift)
        of = self._rows(query.shape[1], key.shape[1], shift, query.device)
        column = torch.arange(scores.shape[-1], device=query.device)
        total, count = scores.sum() * 0.0, 0
        for rows, weights in self._weights(query, key, shift):
            can_choose = column < of.before[rows, None]
            target = weights.sum(dim=3) * can_choose
            sums = target.sum(dim=-1, keepdim=True)
            has_choice = (sums.squeeze(-1) > 0) & (can_choose.sum(dim=-1) > 1)
            target = target / torch.where(sums == 0, 1.0, sums)
            logs = scores[:, :, rows].masked_fill(~can_choose, -torch.inf).log_softmax(dim=-1)
            cross = torch.where(can_choose, target * logs, 0.0)
            divergence = (torch.special.xlogy(target, target) - cross).sum(dim=-1)
            total = total + torch.where(has_choice, divergence, 0.0).sum()
            count += int(has_choice.sum())
        return total / max(count, 1)

    @torch.no_grad()
    def kept_mass(self, query: Tensor, key: Tensor, *, q_offset: int | None = None, kv_offset: int = 0) -> Tensor:
        """As `Gate.kept_mass`; formed a few blocks at a time, like the loss."""
        query, key, shift = self._inputs(query, key, q_offset, kv_offset)
        with without_autocast(query.device):
            tables = self._choose(self._scores(query, key, shift), query.shape[1], key.shape[1], shift)
            parts = []
            for rows, weights in self._weights(query, key, shift):
                kept = tables[:, :, rows, None].expand(*weights.shape[:4], -1)
                parts.append(torch.where(kept < 0, 0.0, weights.gather(-1, kept.clamp(min=0))).sum(dim=-1))
        return torch.cat(parts, dim=2).flatten(2)[:, :, : query.shape[1]]

    @torch.no_grad()
    def freeze(self, query: Tensor, key: Tensor) -> FrozenBlocks:
        """A fixed pattern of the blocks kept for these queries and keys, of one length.

        With several batch rows it keeps, for all of them alike, the blocks with the largest mean probability under the
        softmax of the scores; with one exactly those that the attention would use.

        Returns:
            A pattern for this sequence length, number of heads and causality, which `PatternStore` can save.
        """
        query, key, _ = self._inputs(query, key, None, 0)
        if query.shape[1] != key.shape[1]:
            raise ConfigError(
                f"freeze takes queries and keys of one sequence, got lengths {query.shape[1]} and {key.shape[1]}"
            )
        length = query.shape[1]
        with without_autocast(query.device):
            scores = self._scores(query, key, 0)
        if scores.shape[0] > 1:
            before = self._rows(length, length, 0, query.device).before
            choices = torch.arange(scores.shape[-1], device=query.device) < before[:, None]
            scores = scores.masked_fill(~choices, -torch.inf).log_softmax(dim=-1).logsumexp(dim=0, keepdim=True)
        return self._frozen(self._choose(scores, length, length, 0)[0], length)

    def _frozen(self, tables: Tensor, length: int) -> FrozenBlocks:
        """The pattern that lists `tables` (H, R, k), every block whole: lowering it cuts what causality cuts."""
        import numpy as np

        from ..core.layout import BlockLayout
        from ._stored_blocks import FrozenBlocks

        config, size = self._config, self._pattern.block_size
        heads, rows, _ = tables.shape
        listed = tables.masked_fill(tables < 0, torch.iinfo(tables.dtype).max).sort(dim=-1).values.cpu().numpy()
        kept = listed < np.iinfo(np.int64).max
        cols = listed[kept].astype(np.int32)
        ends = np.concatenate([[0], np.cumsum(kept.sum(axis=-1).ravel())])
        row_ptr = np.stack([ends[head * rows : (head + 1) * rows + 1] for head in range(heads)]).astype(np.int64)
        table = BlockLayout(
            geometry=Geometry.self_attention(length, heads, is_causal=config.is_causal),
            block_size=size,
            head_table=np.arange(heads, dtype=np.int32),
            row_ptr=row_ptr,
            cols=cols,
            weights=np.ones_like(cols),
            mask_ids=np.full_like(cols, -1),
            masks=np.zeros((0, size, size), dtype=np.uint8),
        )
        return FrozenBlocks(table=table, generator=self._pattern)

    def _inputs(self, query: Tensor, key: Tensor, q_offset: int | None, kv_offset: int) -> tuple[Tensor, Tensor, int]:
        """Query and key, detached, as (B, S, H, D), and how far the first query stands after the first key."""
        config = self._config
        if config.tensor_layout == "bhsd" and query.dim() == key.dim() == 4:
            query, key = query.transpose(1, 2), key.transpose(1, 2)
        for name, x, heads in (("query", query, config.num_heads), ("key", key, config.kv_heads)):
            if x.dim() != 4 or x.shape[2:] != (heads, config.head_dim) or not x.shape[0] * x.shape[1]:
                raise ConfigError(
                    f"{name} must have {heads} heads of {config.head_dim}, at least one batch row and one token under "
                    f"tensor_layout={config.tensor_layout!r}, got (batch, seq_len, heads, head_dim) = {tuple(x.shape)}"
                )
        offset = kv_offset + key.shape[1] - query.shape[1] if q_offset is None else q_offset
        return query.detach(), key.detach(), offset - kv_offset

    def _rows(self, q_len: int, kv_len: int, shift: int, device: torch.device) -> TableRows:
        return TableRows.of(self._pattern, q_len, kv_len, shift, is_causal=self._config.is_causal, device=device)

    def _choose(self, scores: Tensor, q_len: int, kv_len: int, shift: int) -> Tensor:
        """The tables (B, H, R, k) for scores (B, H, R, C): blocks on the diagonal, then the best."""
        of = self._rows(q_len, kv_len, shift, scores.device)
        cols = scores.shape[-1]
        column = torch.arange(cols, device=scores.device)
        before, visible = of.before[:, None], of.visible[:, None]
        scores = scores.nan_to_num(nan=torch.finfo(scores.dtype).min)  # finite: the two infinities below have a meaning
        scores = scores.masked_fill(column >= before, -torch.inf)
        scores = scores.masked_fill((column >= before) & (column < visible), torch.inf)
        cut = 2 if self._config.is_causal else 0
        width = min(cols, max(self._most(cols), cut))
        tables = scores.topk(width, dim=-1).indices
        return tables.masked_fill(torch.arange(width, device=scores.device) >= of.kept[:, None], -1)

    def _scores(self, query: Tensor, key: Tensor, shift: int) -> Tensor:
        """(B, H, R, C) for query (B, S, H, D) and key (B, T, K, D)."""
        size, group = self._pattern.block_size, self._config.num_heads // self._config.kv_heads
        summary = self._summaries(query.to(self._dtype))
        strengths = torch.einsum("brhd,hdf->bhrf", summary, self.query_mix.to(self._dtype))
        strengths = (strengths + self.query_bias.to(self._dtype)[:, None]).relu() * self._config.softmax_scale
        keys = torch.einsum("btkd,kdf->bktf", key.to(self._dtype), self.key_mix.to(self._dtype))
        by_group = torch.unflatten(strengths, 1, (-1, group))
        scores = (by_group @ _block_log_means(keys, size).unsqueeze(2).mT).flatten(1, 2)
        return scores + self._nearness(scores.shape[2], scores.shape[3], shift)

    def _summaries(self, query: Tensor) -> Tensor:
        """(B, R, H, D): causal, the first query of each block; else the mean of its queries."""
        size = self._pattern.block_size
        if self._config.is_causal:
            rows = -(-query.shape[1] // size)  # not [::size]: its strides would tell torch.compile lengths apart
            return query.index_select(1, torch.arange(rows, device=query.device) * size)
        return _block_means(query, size)

    def _nearness(self, rows: int, cols: int, shift: int) -> Tensor:
        """(H, R, C): what the distance of two blocks adds to their score."""
        size = self._pattern.block_size
        row = torch.arange(rows, device=self.nearness.device)[:, None]
        column = torch.arange(cols, device=self.nearness.device)
        apart = (row - column).to(self._dtype) + shift / size
        distance = apart.abs()
        features = torch.stack([distance.log1p(), 1 / (1 + distance)], dim=-1)
        if not self._config.is_causal:
            features = torch.cat([features * (apart >= 0).unsqueeze(-1), features * (apart < 0).unsqueeze(-1)], dim=-1)
        return torch.einsum("rcf,hf->hrc", features, self.nearness.to(self._dtype))

    def _weights(self, query: Tensor, key: Tensor, shift: int) -> Iterator[tuple[slice, Tensor]]:
        """Full attention's weights summed over blocks of keys, (B, H, n, b, C), for n rows of blocks at a time.

        They are formed from the log-sum-exp of each block, so that a tile of scores is dropped as soon as it has been
        seen. Queries past the end have the weight 0, as those without keys.
        """
        config, size = self._config, self._pattern.block_size
        (batch, length, heads, _), kv_len = query.shape, key.shape[1]
        queries = functional.pad(query.to(self._dtype).transpose(1, 2), (0, 0, 0, -length % size))
        queries = torch.unflatten(queries, 1, (config.kv_heads, -1))
        keys = functional.pad(key.to(self._dtype).transpose(1, 2), (0, 0, 0, -kv_len % size))
        cols = keys.shape[2] // size
        budget = config.limits.workspace_bytes // (4 * self._dtype.itemsize * batch * heads * size)
        step = max(1, budget // max(cols, size))
        tile = max(1, budget // (step * size))
        for begin in range(0, queries.shape[3] // size, step):
            rows = slice(begin, min(begin + step, queries.shape[3] // size))
            place = torch.arange(rows.start * size, rows.stop * size, device=query.device)
            part = queries[:, :, :, rows.start * size : rows.stop * size]
            seen = min(cols, max(1, rows.stop + shift // size + 1)) if config.is_causal else cols
            logs = [
                self._block_logs(part, keys[:, :, c * size : end * size], place + shift - c * size, kv_len - c * size)
                for c, end in ((c, min(c + tile, seen)) for c in range(0, seen, tile))
            ]
            per_block = functional.pad(torch.cat(logs, dim=-1), (0, cols - seen), value=-torch.inf)
            total = per_block.logsumexp(dim=-1, keepdim=True)
            weights = torch.exp(per_block - torch.where(total == -torch.inf, 0.0, total))
            weights = weights * (place < length)[:, None]
            yield rows, torch.unflatten(weights.flatten(1, 2), 2, (-1, size))

    def _block_logs(self, query: Tensor, key: Tensor, position: Tensor, kv_len: int) -> Tensor:
        """Log-sum-exp of the scores of query (B, K, G, n, D) with each block of key (B, K, t * b, D): (B, K, G, n, t).

        `position` (n,) are the queries' positions counted from the first of these keys, of which kv_len are real.
        """
        scores = (query.flatten(2, 3) @ key.mT).mul_(self._config.softmax_scale)
        scores = torch.unflatten(scores, 2, query.shape[2:4])
        place = torch.arange(key.shape[2], device=key.device)
        sees = place < kv_len
        if self._config.is_causal:
            sees = sees & (place <= position[:, None])
        scores.masked_fill_(~sees, -torch.inf)
        return torch.unflatten(scores, -1, (-1, self._pattern.block_size)).logsumexp(dim=-1)


def _block_means(x: Tensor, size: int) -> Tensor:
    """(B, S, H, D) to (B, R, H, D), each the mean over a block's real tokens."""
    length = x.shape[1]
    sums = torch.unflatten(functional.pad(x, (0, 0, 0, 0, 0, -length % size)), 1, (-1, size)).sum(dim=2)
    counts = (length - torch.arange(0, length, size, device=x.device)).clamp(max=size)
    return sums / counts.view(-1, 1, 1)


def _block_log_means(x: Tensor, size: int) -> Tensor:
    """(B, K, T, F) to (B, K, C, F): the logarithm of the mean exponential over a block's real tokens."""
    length = x.shape[2]
    padded = functional.pad(x, (0, 0, 0, -length % size), value=-torch.inf)
    sums = torch.unflatten(padded, 2, (-1, size)).logsumexp(dim=3)
    counts = (length - torch.arange(0, length, size, device=x.device)).clamp(max=size)
    return sums - counts.to(x.dtype).log().unsqueeze(-1)
