"""Forward and backward of attention, below autograd; tensors (B, S, H, D), lse (B, H, S)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .block_sparsity import BlockSparseTensorsTorch

torch2cute_dtype_map: dict[torch.dtype, object]

class FwdConfig:
    m_block_size: int
    n_block_size: int
    mma_pv_is_rs: bool
    intra_wg_overlap: bool

class AuxData(NamedTuple):
    tensors: list[Tensor] | None = ...
    scalars: tuple[object, ...] | None = ...

class FlashAttentionForwardSm90:
    def __init__(
        self,
        dtype: object,
        head_dim: int,
        head_dim_v: int | None = ...,
        qhead_per_kvhead: int = ...,
        *,
        is_causal: bool = ...,
        is_local: bool = ...,
        pack_gqa: bool = ...,
        tile_m: int = ...,
        tile_n: int = ...,
        num_stages: int = ...,
        num_threads: int = ...,
        intra_wg_overlap: bool = ...,
        mma_pv_is_rs: bool = ...,
        paged_kv_non_tma: bool = ...,
    ) -> None: ...

def to_cute_tensor(t: Tensor, assumed_align: int = ..., leading_dim: int = ...) -> object: ...
def _tile_size_fwd_sm90(head_dim: int, head_dim_v: int, is_causal: bool, is_local: bool) -> FwdConfig: ...
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
