"""The operators of cutlass."""

from .common import AttentionBwOpBase, AttentionFwOpBase

class FwOp(AttentionFwOpBase):
    """Forward."""

class BwOp(AttentionBwOpBase):
    """Backward."""
