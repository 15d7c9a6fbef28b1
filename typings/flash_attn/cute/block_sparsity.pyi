"""Tables of blocks: counts (B, H, R) and indices (B, H, R, C), int32, those with a mask and the full ones apart."""

from typing import NamedTuple

from torch import Tensor

class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = ...
    full_block_idx: Tensor | None = ...
    block_size: tuple[int, int] | None = ...
