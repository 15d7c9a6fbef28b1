"""The registry: manifests of backends and patterns, their discovery, and the choice among them.

What a plugin needs is here; `discovery`, `selection` and `build` are this package's own.
"""

from ..core.geometry import Geometry
from ..core.kernel import DenseKernel, DensePiece, Drops, LayoutKernel, LayoutPiece
from ..core.refusal import Refusal
from .hooks import hookimpl
from .specs import API_VERSION, AXES, Backend, BackendSpec, Device, KernelBackend, PatternSpec, Range, Request

__all__ = [
    "API_VERSION",
    "AXES",
    "Backend",
    "BackendSpec",
    "DenseKernel",
    "DensePiece",
    "Device",
    "Drops",
    "Geometry",
    "KernelBackend",
    "LayoutKernel",
    "LayoutPiece",
    "PatternSpec",
    "Range",
    "Refusal",
    "Request",
    "hookimpl",
]
