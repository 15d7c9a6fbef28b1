"""The masks of blocks, as FlashAttention-4 compiles them into its kernels."""

from typing import Any

from cutlass import Boolean, cute
from flash_attn.cute.utils import scalar_to_ssa


@cute.jit
def in_mask(batch: Any, head: Any, query: Any, key: Any, seqlen_info: Any, tensors: Any) -> Any:
    """Whether a block's mask has a pair: bit k % 32 of word (k / 32) % 4 in row q % 128 of the mask of its block.

    Asked of nothing but blocks that have a mask. `tensors` are those of `MaskBits`.
    """
    number = tensors[1][tensors[0][head[0]], query[0] >> 7, key[0] >> 7]
    word = tensors[2][number, query[0] & 127, (key[0] >> 5) & 3]
    return scalar_to_ssa(((word >> (key[0] & 31)) & 1) != 0, Boolean)
