"""Forward and backward below autograd; tensors (B, S, H, D), lse (B, H, S)."""

from torch import Tensor

def _flash_attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = ...,
    causal: bool = ...,
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
) -> tuple[Tensor, ...]: ...
