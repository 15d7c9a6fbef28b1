"""What Hopper brought."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

class TensorDescriptor:
    """How the bulk copy engine (TMA) finds boxes of a tensor."""

    @staticmethod
    def from_tensor(tensor: Tensor, block_shape: Sequence[int], layout: Any) -> TensorDescriptor: ...
