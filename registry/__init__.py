"""The registry: manifests of backends and patterns, their discovery, and the choice among them.

What a plugin needs is here, what only its kernels and patterns need imported when it is first used; `discovery`,
`selection` and `build` are this package's own.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ..core.geometry import Geometry
from ..core.kernel import DenseKernel, DensePiece, LayoutKernel, LayoutPiece
from ..core.refusal import Refusal
from .hooks import hookimpl
from .specs import API_VERSION, AXES, Backend, BackendSpec, Device, KernelBackend, PatternSpec, Range, Request

if TYPE_CHECKING:
    from ..core.bands import Band
    from ..core.documents import Packing
    from ..core.kernel import (
        Adds,
        BlockTable,
        DrawsOnDevice,
        Drops,
        ForOneLength,
        Joins,
        Packs,
        Prepares,
        Tables,
        TakesDlse,
        Windows,
    )
    from ..core.layout import BlockLayout, Layout
    from ..core.pattern import Branch, KeySpans, LearnedPattern
    from ..core.repeats import Repeats
    from ..core.slabs import Place

# Name -> the module of core that has it.
_HOMES = {
    "Adds": "kernel",
    "Band": "bands",
    "BlockLayout": "layout",
    "BlockTable": "kernel",
    "Branch": "pattern",
    "DrawsOnDevice": "kernel",
    "Drops": "kernel",
    "ForOneLength": "kernel",
    "Joins": "kernel",
    "KeySpans": "pattern",
    "Layout": "layout",
    "LearnedPattern": "pattern",
    "Packing": "documents",
    "Packs": "kernel",
    "Place": "slabs",
    "Prepares": "kernel",
    "Repeats": "repeats",
    "Tables": "kernel",
    "TakesDlse": "kernel",
    "Windows": "kernel",
}

__all__ = [
    "API_VERSION",
    "AXES",
    "Adds",
    "Backend",
    "BackendSpec",
    "Band",
    "BlockLayout",
    "BlockTable",
    "Branch",
    "DenseKernel",
    "DensePiece",
    "Device",
    "DrawsOnDevice",
    "Drops",
    "ForOneLength",
    "Geometry",
    "Joins",
    "KernelBackend",
    "KeySpans",
    "Layout",
    "LayoutKernel",
    "LayoutPiece",
    "LearnedPattern",
    "Packing",
    "Packs",
    "PatternSpec",
    "Place",
    "Prepares",
    "Range",
    "Refusal",
    "Repeats",
    "Request",
    "Tables",
    "TakesDlse",
    "Windows",
    "hookimpl",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"..core.{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
