"""Operators that take tensors (B, S, H, D), or (B, S, K, heads of a group, D)."""

from torch import Tensor

from .fmha.attn_bias import LowerTriangularMask as LowerTriangularMask
from .fmha.common import AttentionBwOpBase, AttentionFwOpBase

def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | LowerTriangularMask | None = ...,
    p: float = ...,
    scale: float | None = ...,
    *,
    op: type[AttentionFwOpBase] | None = ...,
) -> tuple[Tensor, Tensor]: ...
def memory_efficient_attention_backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | LowerTriangularMask | None = ...,
    p: float = ...,
    scale: float | None = ...,
    *,
    op: type[AttentionBwOpBase] | None = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...
