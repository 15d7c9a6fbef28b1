"""The arithmetic that stand-ins for kernel libraries compute with, on CPU, and what the real ones ask of tensors.

Shapes: queries (B, S, H, D), keys and values (B, T, K, D), lse (B, H, S).
"""

from __future__ import annotations

from torch import Tensor

from dilated_attention.core.kernel import DensePiece
from dilated_attention.registry.conformance_ring import ExactDense

_EXACT = ExactDense()


def is_aligned(*tensors: Tensor) -> bool:
    """Addresses and strides are multiples of 16 bytes and the last dimension is contiguous."""
    return all(
        x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(s * x.element_size() % 16 == 0 for s in x.stride()[:-1])
        for x in tensors
    )


def forward(query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Out in the dtype of the queries and lse in float32, computed in float64."""
    out, lse = _EXACT.forward(query, key, value, _piece(scale, is_causal))
    return out, lse.float()


def backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the dtype of the queries, for out and lse of the whole row."""
    assert lse.is_contiguous()
    assert lse.shape == (query.shape[0], query.shape[2], query.shape[1])
    return _EXACT.backward(dout, query, key, value, out, lse, _piece(scale, is_causal))


def _piece(scale: float, is_causal: bool) -> DensePiece:
    return DensePiece(is_causal=is_causal, scale=scale, deterministic=True)
