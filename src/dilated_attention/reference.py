"""The float64 oracle, on dense masks: what every backend is held against."""

from .core.reference import attention, mask_bytes, multiplicity

__all__ = ["attention", "mask_bytes", "multiplicity"]
