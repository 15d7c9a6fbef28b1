"""Forward and backward of attention, below autograd; tensors (B, S, H, D), lse (B, H, S)."""

from collections.abc import Callable

from torch import Tensor

from .block_sparsity import BlockSparseTensorsTorch

def _flash_attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = ...,
    causal: bool = ...,
    window_size_left: int | None = ...,
    window_size_right: int | None = ...,
    mask_mod: Callable[..., object] | None = ...,
    aux_tensors: list[Tensor] | None = ...,
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
    mask_mod: Callable[..., object] | None = ...,
    aux_tensors: list[Tensor] | None = ...,
    block_sparse_tensors: BlockSparseTensorsTorch | None = ...,
    dlse: Tensor | None = ...,
) -> tuple[Tensor, ...]: ...
