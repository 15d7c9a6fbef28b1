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

from ..core.documents import Stack, check_documents, read_documents, stacked
from ..core.dynamic_tables import TableRows
from ..core.errors import ConfigError
from ..core.gate import Gate
from ..core.geometry import Geometry
from ..core.merging import accumulator_dtype
from ..core.ops import without_autocast
from ._block_weights import block_weights

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
        dtype = accumulator_dtype(getattr(torch, config.dtype))
        heads, kv_heads, dim = config.num_heads, config.kv_heads, config.head_dim
        eye = torch.eye(dim, dtype=dtype, device=config.device)
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
        self,
        query: Tensor,
        key: Tensor,
        *,
        q_offset: int | None = None,
        kv_offset: int = 0,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """How far the scores are from the attention that full attention would pay to each block.

        The mean over heads and blocks of queries, of all batch rows or documents together, of KL(p || softmax(scores)),
        p being the attention weights of full (causal) attention, summed over the queries and the keys of a pair of
        blocks and normalised over the blocks that can be chosen: the target of SeerAttention (arXiv 2410.13276, there
        the largest weight instead of their sum) with the loss of DeepSeek-V3.2's warm-up of its sparse-attention
        indexer (KL to the summed and L1-normalised attention). Only blocks of queries that have two key blocks or more
        to choose from count, each as much as any other, so a document counts by how many it has. Only the gate learns
        from it: query and key are detached.

        Weights are formed for a few blocks of queries and keys at a time, within `Limits.workspace_bytes`, and only
        their sums over pairs of blocks are kept.

        Args:
            query: as attention gets it.
            key: as attention gets it.
            q_offset: absolute position of the first query; default: the last query stands at the last key.
            kv_offset: absolute position of the first key.
            key_padding_mask: as attention gets it. Each row is as it would be alone, whatever its padding holds.
            cu_seqlens: as attention gets it, each document as it would be alone.

        Returns:
            A scalar in nats, float32 (float64 for float64); 0 where no block of queries has a choice.

        Raises:
            ConfigError: for shapes, masks and lengths that attention refuses.
        """
        query, key, shift = self._inputs(query, key, q_offset, kv_offset)
        stacks = self._stacks(query, key, key_padding_mask, cu_seqlens, q_offset, kv_offset)
        with without_autocast(query.device):
            dtype = accumulator_dtype(query.dtype)
            total = sum((x * 0).sum(dtype=dtype) for x in self.parameters())  # all are used, whoever has a choice
            count = torch.zeros((), dtype=torch.int64, device=query.device)
            for q, k, apart in _sequences(query, key, shift, stacks):
                own, choices = self._divergence(q, k, apart)
                total, count = total + own, count + choices
            return total / count.clamp(min=1)

    def _divergence(self, query: Tensor, key: Tensor, shift: int) -> tuple[Tensor, Tensor]:
        """Of query (B, S, H, D) and key (B, T, K, D) the sum of all divergences, and of how many it is."""
        scores = self._scores(query, key, shift)
        of = self._rows(query.shape[1], key.shape[1], shift, query.device)
        column = torch.arange(scores.shape[-1], device=query.device)
        total, count = scores.new_zeros(()), torch.zeros((), dtype=torch.int64, device=query.device)
        for rows, weights in block_weights(query, key, shift, self._config, self._pattern.block_size):
            can_choose = column < of.before[rows, None]
            target = weights.sum(dim=3) * can_choose
            sums = target.sum(dim=-1, keepdim=True)
            has_choice = (sums.squeeze(-1) > 0) & (can_choose.sum(dim=-1) > 1)
            target = target / torch.where(sums == 0, 1.0, sums)
            logs = scores[:, :, rows].masked_fill(~can_choose, -torch.inf).log_softmax(dim=-1)
            cross = torch.where(can_choose, target * logs, 0.0)
            divergence = (torch.special.xlogy(target, target) - cross).sum(dim=-1)
            total = total + torch.where(has_choice, divergence, 0.0).sum()
            count = count + has_choice.sum()
        return total, count

    @torch.no_grad()
    def kept_mass(
        self,
        query: Tensor,
        key: Tensor,
        *,
        q_offset: int | None = None,
        kv_offset: int = 0,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """As `Gate.kept_mass`; formed a few blocks at a time, like the loss."""
        query, key, shift = self._inputs(query, key, q_offset, kv_offset)
        stacks = self._stacks(query, key, key_padding_mask, cu_seqlens, q_offset, kv_offset)
        with without_autocast(query.device):
            if stacks is None:
                return self._mass(query, key, shift)
            batch, length, heads, _ = query.shape
            total = query.new_zeros(batch, heads, length, dtype=accumulator_dtype(query.dtype))
            for stack, own in zip(stacks, _sequences(query, key, shift, stacks), strict=True):
                stack.put_values(total, self._mass(*own))
        return total

    def _mass(self, query: Tensor, key: Tensor, shift: int) -> Tensor:
        """`kept_mass` of query (B, S, H, D) and key (B, T, K, D)."""
        tables = self._choose(self._scores(query, key, shift), query.shape[1], key.shape[1], shift)
        parts = []
        for rows, weights in block_weights(query, key, shift, self._config, self._pattern.block_size):
            kept = tables[:, :, rows, None].expand(*weights.shape[:4], -1)
            parts.append(torch.where(kept < 0, 0.0, weights.gather(-1, kept.clamp(min=0))).sum(dim=-1))
        return torch.cat(parts, dim=2).flatten(2)[:, :, : query.shape[1]]

    @torch.no_grad()
    def freeze(
        self,
        query: Tensor,
        key: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> FrozenBlocks:
        """A fixed pattern of the blocks kept for these queries and keys, of one length.

        With several sequences it keeps, for all of them alike, the blocks with the largest mean probability under the
        softmax of the scores; with one exactly those that the attention would use.

        Args:
            query: as attention gets it.
            key: as attention gets it, equally many.
            key_padding_mask: as attention gets it.
            cu_seqlens: as attention gets it.

        Returns:
            A pattern for this sequence length, number of heads and causality, which `PatternStore` can save.

        Raises:
            ConfigError: sequences of several lengths, whose blocks are not the same, or none.
        """
        query, key, _ = self._inputs(query, key, None, 0)
        if query.shape[1] != key.shape[1]:
            raise ConfigError(
                f"freeze takes queries and keys of one sequence, got lengths {query.shape[1]} and {key.shape[1]}"
            )
        stacks = self._stacks(query, key, key_padding_mask, cu_seqlens, None, 0)
        if stacks is not None:
            lengths = sorted({stack.q_len for stack in stacks})
            if len(lengths) != 1:
                found = f"sequences of {', '.join(map(str, lengths))} tokens" if lengths else "padding alone"
                raise ConfigError(
                    f"a frozen pattern is one of a single length, got {found}; freeze those of each length alone"
                )
            query = torch.cat([stack.queries(query) for stack in stacks])
            key = torch.cat([stack.keys(key) for stack in stacks])
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

    def _stacks(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        q_offset: int | None,
        kv_offset: int,
    ) -> tuple[Stack, ...] | None:
        """The sequences of a call of several, read and looked at as the attention does."""
        if key_padding_mask is None and cu_seqlens is None:
            return None
        causal = self._config.is_causal
        check_documents(key_padding_mask, cu_seqlens, query, key, q_offset, kv_offset, is_causal=causal)
        return stacked(read_documents(key_padding_mask, cu_seqlens, query.shape[1], key.shape[1]))

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
        """(B, H, R, C) for query (B, S, H, D) and key (B, T, K, D), whatever the dtype of the parameters is."""
        size, group = self._pattern.block_size, self._config.num_heads // self._config.kv_heads
        dtype = accumulator_dtype(query.dtype)
        summary = self._summaries(query.to(dtype))
        strengths = torch.einsum("brhd,hdf->bhrf", summary, self.query_mix.to(dtype))
        strengths = (strengths + self.query_bias.to(dtype)[:, None]).relu() * self._config.softmax_scale
        keys = torch.einsum("btkd,kdf->bktf", key.to(dtype), self.key_mix.to(dtype))
        by_group = torch.unflatten(strengths, 1, (-1, group))
        scores = (by_group @ _block_log_means(keys, size).unsqueeze(2).mT).flatten(1, 2)
        return scores + self._nearness(scores.shape[2], scores.shape[3], shift, dtype)

    def _summaries(self, query: Tensor) -> Tensor:
        """(B, R, H, D): causal, the first query of each block; else the mean of its queries."""
        size = self._pattern.block_size
        if self._config.is_causal:
            rows = -(-query.shape[1] // size)  # not [::size]: its strides would tell torch.compile lengths apart
            return query.index_select(1, torch.arange(rows, device=query.device) * size)
        return _block_means(query, size)

    def _nearness(self, rows: int, cols: int, shift: int, dtype: torch.dtype) -> Tensor:
        """(H, R, C): what the distance of two blocks adds to their score."""
        size = self._pattern.block_size
        row = torch.arange(rows, device=self.nearness.device)[:, None]
        column = torch.arange(cols, device=self.nearness.device)
        apart = (row - column).to(dtype) + shift / size
        distance = apart.abs()
        features = torch.stack([distance.log1p(), 1 / (1 + distance)], dim=-1)
        if not self._config.is_causal:
            features = torch.cat([features * (apart >= 0).unsqueeze(-1), features * (apart < 0).unsqueeze(-1)], dim=-1)
        return torch.einsum("rcf,hf->hrc", features, self.nearness.to(dtype))


def _sequences(
    query: Tensor, key: Tensor, shift: int, stacks: tuple[Stack, ...] | None
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Queries, keys and shift of the sequences of each length, or those of the call."""
    if stacks is None:
        yield query, key, shift
        return
    for stack in stacks:
        yield stack.queries(query), stack.keys(key), stack.kv_len - stack.q_len


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
