"""Attention, and its forward and backward below autograd; tensors (B, S, H, D), lse (B, H, S)."""

from torch import Tensor

from .block_sparsity import BlockSparseTensorsTorch

def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window_size: tuple[int | None, int | None] = ...,
) -> tuple[Tensor, Tensor | None]: ...
def _flash_attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    window_size_left: int | None = ...,
    window_size_right: int | None = ...,
    block_sparse_tensors: BlockSparseTensorsTorch | None = ...,
    return_lse: bool = ...,
) -> tuple[Tensor, ...]: ...
def _flash_attn_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    *,
    window_size_left: int | None = ...,
    window_size_right: int | None = ...,
    block_sparse_tensors: BlockSparseTensorsTorch | None = ...,
) -> tuple[Tensor, ...]: ...
