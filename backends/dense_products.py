"""Dense pieces by PyTorch's own batched matrix products, in chunks, on whatever device its tensors are; with dropout.

Shapes: B batch, S query length, T key length, H query heads, K key-value heads, D head_dim, I items, of which each is a
query head of a batch row. Scores are formed in the accumulator's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from ..core.draws import Draws
from ..core.kernel import DensePiece
from ..core.limits import Limits, at_once
from ..core.merging import accumulator_dtype, delta_of
from ..core.products import attend_rows, bmm, score_gradients, widened

_CAUSAL_ROWS = 128  # of a square that are computed together, so that little of what they do not see is
_SCORE_SIZED = 2  # temporaries of a chunk that are as large as its scores, at most; with draws twice as many
_ROW_SIZED = 2  # and as large as its queries, and as its keys


@attrs.frozen(eq=False)
class DenseProducts:
    """A dense kernel.

    Attributes:
        name: as plans show it.
        workspace_bytes: bound on the temporaries of one step.
        draws: the dropout of the one pass that it is for; None without.
    """

    name: str = "matrix products"
    workspace_bytes: int = Limits().workspace_bytes
    draws: Draws | None = None
    takes_dlse: bool = True
    takes_dropout: bool = True

    def dropping(self, dropout_p: float, seed: Tensor, device: torch.device) -> DenseProducts:
        """See `Drops`; dropout_p is rounded to 16 bits."""
        return attrs.evolve(self, draws=Draws.of(dropout_p, seed, device))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        """See `DenseKernel`."""
        batch, length, heads, _ = query.shape
        q, k, v = _items(query), _items(key), _items(value)
        out = torch.empty(q.shape, dtype=accumulator_dtype(query.dtype), device=query.device)
        lse = torch.empty(q.shape[:2], dtype=out.dtype, device=query.device)
        factors = None if self.draws is None else self.draws.factors
        for items, rows, cols, of_keys in self._chunks(query, key, piece):
            scores = self._scores(q[items, rows], _taken(k, of_keys, cols), rows, piece)
            out[items, rows], lse[items, rows] = attend_rows(scores, _taken(v, of_keys, cols), factors)
        return _rows(out, batch).to(query.dtype), lse.view(batch, heads, length)

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `DenseKernel`."""
        batch = query.shape[0]
        delta = delta_of(dout, piece.dlse, out).flatten(0, 1).unsqueeze(-1)
        lse = lse.flatten(0, 1).unsqueeze(-1)
        do, q, k, v = (_items(x) for x in (dout, query, key, value))
        dq, dk, dv = (torch.zeros(x.shape, dtype=accumulator_dtype(query.dtype), device=x.device) for x in (q, k, v))
        for items, rows, cols, of_keys in self._chunks(query, key, piece):
            do_part, q_part, k_part = do[items, rows], q[items, rows], _taken(k, of_keys, cols)
            p = self._scores(q_part, k_part, rows, piece).sub_(lse[items, rows]).exp_()
            kept = None if self.draws is None else self.draws.factors(p)
            dv[:, cols].index_add_(0, of_keys, bmm((p if kept is None else p * kept).to(do.dtype).mT, do_part))
            v_part = _taken(v, of_keys, cols)
            ds = score_gradients(p, kept, do_part, v_part, delta[items, rows], piece.scale).to(q.dtype)
            dq[items, rows] = bmm(ds, k_part)
            dk[:, cols].index_add_(0, of_keys, bmm(ds.mT, q_part))
        return _rows(dq, batch), _rows(dk, batch), _rows(dv, batch)

    def _chunks(self, query: Tensor, key: Tensor, piece: DensePiece) -> Iterator[tuple[slice, slice, slice, Tensor]]:
        """Items and rows that are computed together, the columns that they may see, and the items of their keys."""
        (batch, length, heads, head_dim), (_, kv_len, kv_heads, _) = query.shape, key.shape
        itemsize, room = accumulator_dtype(query.dtype).itemsize, at_once(self.workspace_bytes, query)
        score_sized = _SCORE_SIZED if self.draws is None else 2 * _SCORE_SIZED
        row_bytes = (score_sized * kv_len + _ROW_SIZED * head_dim) * itemsize
        rows = min(length, max(1, room // row_bytes), _CAUSAL_ROWS if piece.is_causal else length)
        # One item's keys are copied whatever room there is: with fewer rows they would be more often.
        items = max(1, room // (rows * row_bytes + _ROW_SIZED * kv_len * head_dim * itemsize))
        item = torch.arange(batch * heads, device=query.device)
        of_keys = item // heads * kv_heads + item % heads // (heads // kv_heads)
        for first in range(0, batch * heads, items):
            for row in range(0, length, rows):
                last = kv_len if not piece.is_causal else min(row + rows, kv_len)
                yield (
                    slice(first, first + items),
                    slice(row, row + rows),
                    slice(0, last),
                    of_keys[first : first + items],
                )

    def _scores(self, q: Tensor, k: Tensor, rows: slice, piece: DensePiece) -> Tensor:
        """Scaled scores (I, rows, columns), -inf where a causal piece hides a key."""
        scores = bmm(q, k.mT).mul_(piece.scale)
        if piece.is_causal:
            row = torch.arange(rows.start, rows.start + q.shape[1], device=q.device)
            hidden = torch.arange(k.shape[1], device=q.device) > row[:, None]
            scores.masked_fill_(hidden, -math.inf)
        return scores


def _items(x: Tensor) -> Tensor:
    """x (B, S, H, D) as (B * H, S, D); float32 for halves on CPU."""
    return widened(x.transpose(1, 2).flatten(0, 1))


def _taken(x: Tensor, items: Tensor, cols: slice) -> Tensor:
    """Some columns of items (I, T, D)."""
    return x[:, cols].index_select(0, items)


def _rows(x: Tensor, batch: int) -> Tensor:
    """The inverse of `_items`, as a view."""
    return torch.unflatten(x, 0, (batch, -1)).transpose(1, 2)
