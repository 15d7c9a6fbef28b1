"""The arithmetic that stand-ins for kernel libraries compute with, on CPU, and what the real ones ask of tensors.

Shapes: queries (B, S, H, D), keys and values (B, T, K, D), lse (B, H, S).
"""

from __future__ import annotations

import math

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
        if piece.dlse is None:
            return super().backward(dout, query, key, value, out, lse, piece)
        head_dim = query.shape[3]
        dout, query, out = widen_rows(dout, piece.dlse, query, out)
        key, value = (functional.pad(x, (0, WIDENING)) for x in (key, value))
        grads = super().backward(dout, query, key, value, out, lse, piece)
        dq, dk, dv = (grad[..., :head_dim] for grad in grads)
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


def forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool, window: Window = _NONE
) -> tuple[Tensor, Tensor]:
    """Out in the dtype of the queries and lse in float32, computed in float64."""
    out, lse = _EXACT.forward(query, key, value, _piece(scale, is_causal, window))
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the dtype of the queries, for out and lse of the whole row."""
    assert lse.is_contiguous()
    assert lse.shape == (query.shape[0], query.shape[2], query.shape[1])
    head_dim = query.shape[3]
    if dlse is not None:
        assert dlse.is_contiguous()
        dout, query, out = widen_rows(dout, dlse, query, out)
        key, value = (functional.pad(x, (0, WIDENING)) for x in (key, value))
    grads = _EXACT.backward(dout, query, key, value, out, lse, _piece(scale, is_causal, window))
    dq, dk, dv = (grad[..., :head_dim] for grad in grads)
    return dq, dk, dv


def _piece(scale: float, is_causal: bool, window: Window) -> DensePiece:
    left, right = window
    sides = None if left in (None, -1) and right in (None, -1) else (left or 0, right or 0)
    return DensePiece(is_causal=is_causal, scale=scale, deterministic=True, window=sides)
