"""Exact attention for long sequences: patterns say who attends to whom, backends compute it, chosen once and explained.

Importing this package imports neither torch nor numpy: every name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .core.version import VERSION

if TYPE_CHECKING:
    from . import errors, reference, registry
    from .core.attention import Attention
    from .core.config import AttentionConfig
    from .core.errors import (
        ConfigError,
        DilatedAttentionError,
        NoBackendError,
        PatternFileError,
        PluginError,
        RingBroken,
        UnsafePathError,
    )
    from .core.limits import Limits
    from .core.pattern import Full, Pattern, Sum, Union
    from .core.plan import AttentionPlan
    from .patterns.dilated import Dilated
    from .patterns.global_tokens import Global
    from .patterns.local import Local
    from .patterns.strided import Strided
    from .registry.build import build_attention, explain

__version__ = VERSION

# Public name -> the module that has it; a name that stands for a module itself maps to None.
_HOMES: dict[str, str | None] = {
    "Attention": "core.attention",
    "AttentionConfig": "core.config",
    "AttentionPlan": "core.plan",
    "ConfigError": "core.errors",
    "Dilated": "patterns.dilated",
    "DilatedAttentionError": "core.errors",
    "Full": "core.pattern",
    "Global": "patterns.global_tokens",
    "Limits": "core.limits",
    "Local": "patterns.local",
    "NoBackendError": "core.errors",
    "Pattern": "core.pattern",
    "PatternFileError": "core.errors",
    "PluginError": "core.errors",
    "RingBroken": "core.errors",
    "Strided": "patterns.strided",
    "Sum": "core.pattern",
    "Union": "core.pattern",
    "UnsafePathError": "core.errors",
    "build_attention": "registry.build",
    "errors": None,
    "explain": "registry.build",
    "reference": None,
    "registry": None,
}

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionPlan",
    "ConfigError",
    "Dilated",
    "DilatedAttentionError",
    "Full",
    "Global",
    "Limits",
    "Local",
    "NoBackendError",
    "Pattern",
    "PatternFileError",
    "PluginError",
    "RingBroken",
    "Strided",
    "Sum",
    "Union",
    "UnsafePathError",
    "__version__",
    "build_attention",
    "errors",
    "explain",
    "reference",
    "registry",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    if home is None:
        return importlib.import_module(f"{__name__}.{name}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value  # so that the next use costs nothing
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
