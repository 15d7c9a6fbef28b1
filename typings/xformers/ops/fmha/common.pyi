"""What operators declare of themselves."""

from typing import ClassVar

import torch

class AttentionOpBase:
    """One direction of one kernel."""

    NAME: ClassVar[str]
    CUDA_MINIMUM_COMPUTE_CAPABILITY: ClassVar[tuple[int, int]]
    CUDA_MAXIMUM_COMPUTE_CAPABILITY: ClassVar[tuple[int, int] | None]
    SUPPORTED_DTYPES: ClassVar[set[torch.dtype]]
    SUPPORTED_MIN_K: ClassVar[int]
    SUPPORTED_MAX_K: ClassVar[int]
    IS_DETERMINISTIC: ClassVar[bool]

    @classmethod
    def is_available(cls) -> bool: ...

class AttentionFwOpBase(AttentionOpBase):
    """Forward."""

class AttentionBwOpBase(AttentionOpBase):
    """Backward."""
