"""The errors of this package, under the name that users import them by."""

from .core.errors import (
    ConfigError,
    DilatedAttentionError,
    NoBackendError,
    PatternFileError,
    PatternNotFoundError,
    PluginError,
    RingBroken,
    UnsafePathError,
)

__all__ = [
    "ConfigError",
    "DilatedAttentionError",
    "NoBackendError",
    "PatternFileError",
    "PatternNotFoundError",
    "PluginError",
    "RingBroken",
    "UnsafePathError",
]
