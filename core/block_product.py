"""Attention over a table of blocks with batched matrix products: core's own way where a backend has only dense kernels.

Shapes: B batch, S query length, T key length, H query heads, K key-value heads, D head_dim, b block size, I items. An
item is one block row of one head; items with equally many partial and full blocks form one class and are computed
together, in chunks whose temporaries stay within `Limits.workspace_bytes`. Each row's softmax runs over all of its
blocks at once, so nothing is merged. Scores are formed in the accumulator's dtype (float32; float64 for float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import attrs
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .draws import Draws
from .kernel import DensePiece, Tables
from .layout import BlockLayout
from .limits import at_once
from .merging import accumulator_dtype, delta_of
from .products import attend_rows, bmm, score_gradients, widened
from .tracing import span

if TYPE_CHECKING:
    from .config import AttentionConfig
    from .kernel import BlockTable


def block_table(
    blocks: BlockLayout, kernel: object, *, scale: float, config: AttentionConfig, device: torch.device
) -> BlockTable:
    """What computes a table of blocks: the dense kernel where it does that too, else core's own product."""
    if isinstance(kernel, Tables):
        piece = DensePiece(is_causal=False, scale=scale, deterministic=config.deterministic)
        found = kernel.table(blocks, piece, device)
        if found is not None:
            return found
    dtype, workspace_bytes = getattr(torch, config.dtype), config.limits.workspace_bytes
    return BlockProduct.prepare(blocks, scale=scale, device=device, dtype=dtype, workspace_bytes=workspace_bytes)


@attrs.frozen(eq=False)
class ItemClass:
    """Items with the same numbers of partial and full blocks; indices count over (head, block) of one batch row.

    Over (batch, head, block) where the product has one index.

    Attributes:
        queries: (I,) int64, the block row of each item.
        keys: (I, partial + full) int64, the key blocks, partial ones first.
        masks: (I, partial) int64, rows of the bias table.
        log_weights: (I, full) accumulator dtype, or None where all weights are 1.
    """

    queries: Tensor
    keys: Tensor
    masks: Tensor
    log_weights: Tensor | None

    def chunks(self, block_bytes: int, workspace_bytes: int) -> Iterator[ItemClass]:
        """Consecutive items whose temporaries, block_bytes per key block, fit the workspace (at least one item)."""
        size = max(1, workspace_bytes // (block_bytes * self.keys.shape[1]))
        for i in range(0, self.queries.shape[0], size):
            log_weights = None if self.log_weights is None else self.log_weights[i : i + size]
            yield ItemClass(self.queries[i : i + size], self.keys[i : i + size], self.masks[i : i + size], log_weights)

    @property
    def nbytes(self) -> int:
        """Memory that the indices occupy."""
        tensors = (self.queries, self.keys, self.masks, self.log_weights)
        return sum(x.nbytes for x in tensors if x is not None)


@attrs.frozen(eq=False)
class BlockProduct:
    """Rows of blocks made ready for one device and dtype.

    Attributes:
        block_size: b.
        classes: the rows, sorted into classes.
        bias: (M, b, b), the logarithm of the masks' multiplicities, -inf where a pair does not count.
        scale: factor on q·k.
        workspace_bytes: bound on the temporaries of one step.
        one_index: the classes count through all batch rows, which may see different blocks; else each batch row is
            computed with the same classes.
        has_repeats: some mask counts a pair more than once.
        draws: the dropout of the one pass that it is for; None without.
    """

    block_size: int
    classes: tuple[ItemClass, ...]
    bias: Tensor
    scale: float
    workspace_bytes: int
    one_index: bool = False
    has_repeats: bool = False
    draws: Draws | None = None

    @classmethod
    def prepare(
        cls, layout: BlockLayout, *, scale: float, device: torch.device, dtype: torch.dtype, workspace_bytes: int
    ) -> BlockProduct:
        """Sort the layout's rows into classes and move its tables to `device`."""
        accumulate = accumulator_dtype(dtype)
        bias = torch.tensor(layout.masks, dtype=accumulate, device=device).log_()
        return cls(
            layout.block_size,
            tuple(_classes(layout, device, accumulate)),
            bias,
            scale,
            workspace_bytes,
            has_repeats=layout.masks.max(initial=0) > 1,
        )

    @property
    def name(self) -> str:
        """As traces show it."""
        return f"blocks of {self.block_size}"

    @property
    def nbytes(self) -> int:
        """Memory that classes and masks occupy."""
        return self.bias.nbytes + sum(c.nbytes for c in self.classes)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return out (B, S, H, D) and lse (B, H, S) in the accumulator's dtype; rows without keys give 0 and -inf."""
        dtype = accumulator_dtype(query.dtype)
        q_blocks = self._blocks(query)
        take_k, take_v = self._source(key), self._source(value)
        out = torch.zeros(q_blocks.shape, dtype=dtype, device=query.device)
        lse = torch.full(q_blocks.shape[:3], -math.inf, dtype=dtype, device=query.device)
        with span(self.name):
            for row in range(q_blocks.shape[0]):
                for part in self._chunks(query):
                    q, k, v = _take(q_blocks[row], part.queries), take_k(row, part.keys), take_v(row, part.keys)
                    part_out, part_lse = attend_rows(self._scores(q, k, part), v, self._factors(part))
                    out[row].index_copy_(0, part.queries, part_out)
                    lse[row].index_copy_(0, part.queries, part_lse)
        return self._rows(out, query), self._row_values(lse, query)

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, delta: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients in the accumulator's dtype.

        Args:
            dout: (B, S, H, D).
            query: (B, S, H, D).
            key: (B, T, K, D).
            value: (B, T, K, D).
            delta: (B, H, S), sum(dout * out) - dlse of the whole row.
            lse: (B, H, S), of the whole row; +inf where it has no keys.
        """
        dtype = accumulator_dtype(query.dtype)
        do_blocks, q_blocks, k_blocks, v_blocks = (self._blocks(x) for x in (dout, query, key, value))
        lse_blocks, delta_blocks = self._row_blocks(lse, math.inf), self._row_blocks(delta, 0.0)
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q_blocks, k_blocks, v_blocks))
        with span(self.name):
            for row in range(q_blocks.shape[0]):
                for part in self._chunks(query):
                    do, q = _take(do_blocks[row], part.queries), _take(q_blocks[row], part.queries)
                    k, v = _take(k_blocks[row], part.keys), _take(v_blocks[row], part.keys)
                    lse_part = lse_blocks[row].index_select(0, part.queries).unsqueeze(-1)
                    delta_part = delta_blocks[row].index_select(0, part.queries).unsqueeze(-1)
                    p = self._scores(q, k, part).sub_(lse_part).exp_()
                    factors = self._factors(part)
                    kept = None if factors is None else factors(p)
                    _put_add(dv[row], part.keys, bmm((p if kept is None else p * kept).to(do.dtype).mT, do))
                    ds = score_gradients(p, kept, do, v, delta_part, self.scale).to(q.dtype)
                    del p, kept
                    dq[row].index_copy_(0, part.queries, bmm(ds, k))
                    _put_add(dk[row], part.keys, bmm(ds.mT, q))
        return self._rows(dq, query), self._rows(dk, key), self._rows(dv, value)

    def gradients(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `BlockTable.gradients`."""
        return self.backward(dout, query, key, value, delta_of(dout, dlse, out), lse)

    def received(self, query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        """The attention that each key receives, (B, H, T) in the accumulator's dtype; `lse` as in `backward`."""
        q_blocks, k_blocks = self._blocks(query), self._blocks(key)
        lse_blocks = self._row_blocks(lse, math.inf)
        batch, heads, kv_len = query.shape[0], query.shape[2], key.shape[1]
        q_rows, k_rows = -(-query.shape[1] // self.block_size), -(-kv_len // self.block_size)
        total = lse.new_zeros(q_blocks.shape[0], q_blocks.shape[1] // q_rows * k_rows, self.block_size)
        for row in range(q_blocks.shape[0]):
            for part in self._chunks(query):
                q, k = _take(q_blocks[row], part.queries), _take(k_blocks[row], part.keys)
                lse_part = lse_blocks[row].index_select(0, part.queries).unsqueeze(-1)
                sums = self._scores(q, k, part).sub_(lse_part).exp_().sum(dim=1)
                # Heads of queries, which may share keys, receive each for itself.
                places = (part.queries // q_rows * k_rows)[:, None] + part.keys % k_rows
                _put_add(total[row], places, sums)
        return total.view(batch, heads, -1)[:, :, :kv_len]

    def _scores(self, q: Tensor, k: Tensor, part: ItemClass) -> Tensor:
        """Scaled scores (I, b, blocks * b) with the logarithm of the multiplicities added."""
        return self._with_counts(bmm(q, k.mT).mul_(self.scale), part)

    def _with_counts(self, scores: Tensor, part: ItemClass) -> Tensor:
        """Scores with the logarithm of the multiplicities added, in place."""
        partial = part.masks.shape[1]
        blocks = torch.unflatten(scores, -1, (-1, self.block_size))
        if partial:
            bias = torch.unflatten(self.bias.index_select(0, part.masks.flatten()), 0, part.masks.shape)
            blocks[:, :, :partial] += bias.transpose(1, 2)
        if part.log_weights is not None:
            blocks[:, :, partial:] += part.log_weights[:, None, :, None]
        return scores

    def _factors(self, part: ItemClass) -> Callable[[Tensor], Tensor] | None:
        """What draws the factors of a chunk's weights, shaped as they are; None without dropout."""
        draws = self.draws
        if draws is None:
            return None
        if not self._repeats(part):
            return draws.factors
        return lambda like: draws.factors(like, self._with_counts(torch.zeros_like(like), part).exp_().round_())

    def _repeats(self, part: ItemClass) -> bool:
        """Whether some pairs of these items may count more than once."""
        return part.log_weights is not None or self.has_repeats

    def _chunks(self, query: Tensor) -> Iterator[ItemClass]:
        size, head_dim = self.block_size, query.shape[3]
        for group in self.classes:
            # Two score-sized and two key-sized temporaries live at once, at most 8 bytes an element; with draws a
            # third, and a fourth where they count.
            scores = 2 if self.draws is None else 3 + self._repeats(group)
            block_bytes = size * (scores * size + 2 * head_dim) * accumulator_dtype(query.dtype).itemsize
            yield from group.chunks(block_bytes, at_once(self.workspace_bytes, query))

    def _blocks(self, x: Tensor) -> Tensor:
        """x (B, S, H, D) as contiguous blocks (B, H * blocks, b, D), zeros past the end; float32 for halves on CPU.

        With one index (1, B * H * blocks, b, D).
        """
        size = self.block_size
        x = functional.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % size))
        x = torch.unflatten(x, 2, (-1, size)).flatten(1, 2)
        return widened(x.flatten(0, 1).unsqueeze(0) if self.one_index else x)

    def _source(self, x: Tensor) -> Callable[[int, Tensor], Tensor]:
        """What takes blocks of x (B, T, K, D) for a batch row at an index (I, c), as `_take` does.

        Few ones, as of a step of decoding, are taken where they lie: arranging all would cost more than using them.
        """
        batch, length, heads, head_dim = x.shape
        rows, size = -(-length // self.block_size), self.block_size
        each = heads * rows * (batch if self.one_index else 1)
        if 2 * sum(part.keys.numel() for part in self.classes) >= each:
            blocks = self._blocks(x)
            return lambda row, index: _take(blocks[row], index)
        place = torch.arange(size, device=x.device)

        def take(row: int, index: Tensor) -> Tensor:
            head = index.flatten()[:, None] // rows
            # Past the end there is the last key again, which masks hide.
            at = (index.flatten()[:, None] % rows * size + place).clamp(max=length - 1)
            return widened(x[head // heads + row, at, head % heads].view(index.shape[0], -1, head_dim))

        return take

    def _row_blocks(self, x: Tensor, fill: float) -> Tensor:
        """x (B, H, S) as (B, H * blocks, b), `fill` past the end; with one index (1, B * H * blocks, b)."""
        size = self.block_size
        padded = functional.pad(x, (0, -x.shape[2] % size), value=fill)
        rows = torch.unflatten(padded, 2, (-1, size)).flatten(1, 2)
        return rows.flatten(0, 1).unsqueeze(0) if self.one_index else rows

    @staticmethod
    def _row_values(blocks: Tensor, like: Tensor) -> Tensor:
        """The inverse of `_row_blocks`: (B, H, S) as a view."""
        batch, length, heads, _ = like.shape
        return blocks.view(batch, heads, -1)[:, :, :length]

    @staticmethod
    def _rows(blocks: Tensor, like: Tensor) -> Tensor:
        """The inverse of `_blocks`: (B, S, H, D) as a view."""
        batch, length, heads, head_dim = like.shape
        return blocks.view(batch, heads, -1, head_dim)[:, :, :length].transpose(1, 2)


def _take(blocks: Tensor, index: Tensor) -> Tensor:
    """Blocks (N, b, D) at index (I,) or (I, c) as (I, b, D) or (I, c * b, D)."""
    taken = blocks.index_select(0, index.flatten())
    return taken if index.dim() == 1 else taken.reshape(index.shape[0], -1, blocks.shape[-1])


def _put_add(blocks: Tensor, index: Tensor, x: Tensor) -> None:
    """Add x (I, c * b, D) to blocks (N, b, D) at index (I, c)."""
    blocks.index_add_(0, index.flatten(), x.reshape(-1, *blocks.shape[1:]).to(blocks.dtype))


def _classes(layout: BlockLayout, device: torch.device, dtype: torch.dtype) -> Iterator[ItemClass]:
    geometry, size = layout.geometry, layout.block_size
    q_rows, k_rows = -(-geometry.q_len // size), -(-geometry.kv_len // size)
    tables = layout.row_ptr.shape[0]
    entry_row = np.repeat(np.arange(tables * q_rows), np.diff(layout.row_ptr, axis=1).ravel())
    is_partial = layout.mask_ids >= 0
    partial = np.bincount(entry_row[is_partial], minlength=tables * q_rows)
    full = np.bincount(entry_row[~is_partial], minlength=tables * q_rows)
    # Entries of a row, partial ones first; a stable sort keeps the columns ascending.
    order = np.lexsort((~is_partial, entry_row))
    start = layout.row_ptr[:, :-1].ravel()
    heads_of = [np.flatnonzero(layout.head_table == table) for table in range(tables)]

    def move(x: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int64)).to(device)

    kinds = np.stack([partial, full], axis=-1)
    for n_partial, n_full in np.unique(kinds[kinds.sum(axis=-1) > 0], axis=0):
        queries, keys, masks, weights = [], [], [], []
        for table in range(tables):
            mine = slice(table * q_rows, (table + 1) * q_rows)
            rows = np.flatnonzero((kinds[mine] == (n_partial, n_full)).all(axis=-1))
            entries = order[start[mine][rows][:, None] + np.arange(n_partial + n_full)]
            for head in heads_of[table]:
                queries.append(head * q_rows + rows)
                keys.append(head // geometry.group_size * k_rows + layout.cols[entries].astype(np.int64))
                masks.append(layout.mask_ids[entries[:, :n_partial]])
                weights.append(layout.weights[entries[:, n_partial:]])
        weight = np.concatenate(weights)
        yield ItemClass(
            move(np.concatenate(queries)),
            move(np.concatenate(keys)),
            move(np.concatenate(masks)),
            None if (weight == 1).all() else torch.from_numpy(weight).to(device, dtype).log(),
        )
