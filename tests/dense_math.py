"""The arithmetic that stand-ins for kernel libraries compute with, on CPU, and what the real ones ask of tensors.

Shapes: queries (B, S, H, D), keys and values (B, T, K, D), lse (B, H, S).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dilated_attention.core.composer import widen_rows
from dilated_attention.core.kernel import WIDENING, DensePiece
from dilated_attention.registry.conformance.ring import ExactDense


class ExactWindows(ExactDense):
    """Dense pieces by the definition, those with a window too."""

    takes_windows = True

    def _scores(self, query: Tensor, key: Tensor, piece: DensePiece) -> Tensor:
        scores = super()._scores(query, key, piece)
        if piece.window is None:
            return scores
        rows, cols = scores.shape[-2:]
        assert not piece.is_causal
        assert rows <= cols
        assert 0 <= min(piece.window) <= max(piece.window) <= cols
        distance = torch.arange(cols) - torch.arange(rows)[:, None] - (cols - rows)
        is_seen = (distance >= -piece.window[0]) & (distance <= piece.window[1])
        assert is_seen.any(-1).all()
        return scores.masked_fill(~is_seen, -math.inf)


class ExactSeen(ExactDense):
    """What of the keys each query sees is a mask (H, S, T)."""

    def __init__(self, seen: Tensor) -> None:
        self.seen = seen

    def _scores(self, query: Tensor, key: Tensor, piece: DensePiece) -> Tensor:
        return super()._scores(query, key, piece).masked_fill(~self.seen, -math.inf)


class ExactSquares(ExactDense):
    """Dense pieces by the definition, of kernels that have no windows; of each piece, how many of how many rows."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.rows: list[int] = []

    def _scores(self, query: Tensor, key: Tensor, piece: DensePiece) -> Tensor:
        assert piece.window is None
        assert query.stride(3) == key.stride(3) == 1
        rows, cols = query.shape[1], key.shape[1]
        assert min(query.shape[0], rows, cols) > 0
        assert not piece.is_causal or rows == cols
        self.sizes.append(query.shape[0])
        self.rows.append(rows)
        return super()._scores(query, key, piece)


class ExactThroughLse(ExactSquares):
    """One of them whose backward takes the gradient of lse."""

    takes_dlse = True

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert query.shape[3] == key.shape[3] == value.shape[3] == 8  # none came widened
        return _through_lse(super().backward, dout, query, key, value, out, lse, piece, piece.dlse)


def _through_lse(
    run: Callable[..., tuple[Tensor, Tensor, Tensor]],
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    piece: DensePiece,
    dlse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward without dlse finds, and with one in more columns."""
    if dlse is None:
        return run(dout, query, key, value, out, lse, piece)
    head_dim = query.shape[3]
    dout, query, out = widen_rows(dout, dlse, query, out)
    key, value = (functional.pad(x, (0, WIDENING)) for x in (key, value))
    dq, dk, dv = (grad[..., :head_dim] for grad in run(dout, query, key, value, out, lse, piece))
    return dq, dk, dv


_EXACT = ExactWindows()
Window = tuple[int | None, int | None]
_NONE: Window = (None, None)


def is_aligned(*tensors: Tensor) -> bool:
    """Addresses and strides are multiples of 16 bytes and the last dimension is contiguous."""
    return all(
        x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
        for x in tensors
    )


def seen_of_lists(
    lists: Any,
    mask_mod: Callable[..., Tensor],
    tensors: Sequence[Tensor] | None,
    query: Tensor,
    key: Tensor,
    *,
    of_keys: bool,
) -> Tensor | None:
    """The pairs (H, S, T) that lists of blocks with and without a mask say; None without lists."""
    if lists is None:
        return None
    for x in tensors or ():  # as the library asks: one dimension alone has stride 1, or of several one has a size
        near = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride == 1]
        assert len(near) == 1 or sum(size > 1 for size in near) == 1
    (rows, cols), heads = lists.block_size, query.shape[2]
    places = [torch.arange(n) for n in (query.shape[1], key.shape[1])]
    seen = torch.zeros(heads, *(len(x) for x in places), dtype=torch.bool)
    for is_masked, counts, indices in ((True, *lists[:2]), (False, *lists[2:4])):
        for head in range(heads):
            own = head if counts.shape[1] > 1 else 0
            for along, count in enumerate(counts[0, own].tolist()):
                for across in indices[0, own, along, :count].tolist():
                    row, col = (across, along) if of_keys else (along, across)
                    q = places[0][row * rows : (row + 1) * rows, None]
                    k = places[1][col * cols : (col + 1) * cols]
                    seen[head, q, k] = mask_mod([0], [head], [q], [k], None, tensors) if is_masked else True
    return seen


def _exact(seen: Tensor | None) -> ExactDense:
    return _EXACT if seen is None else ExactSeen(seen)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    is_causal: bool,
    window: Window = _NONE,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Out in the dtype of the queries and lse in float32, computed in float64."""
    out, lse = _exact(seen).forward(query, key, value, _piece(scale, is_causal, window))
    return out, lse.float()


def backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    window: Window = _NONE,
    dlse: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the dtype of the queries, for out and lse of the whole row."""
    assert lse.is_contiguous()
    assert lse.shape == (query.shape[0], query.shape[2], query.shape[1])
    assert dlse is None or dlse.is_contiguous()
    return _through_lse(
        _exact(seen).backward, dout, query, key, value, out, lse, _piece(scale, is_causal, window), dlse
    )


def _piece(scale: float, is_causal: bool, window: Window) -> DensePiece:
    left, right = window
    sides = None if left in (None, -1) and right in (None, -1) else (left or 0, right or 0)
    return DensePiece(is_causal=is_causal, scale=scale, deterministic=True, window=sides)
