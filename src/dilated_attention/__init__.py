"""Exact attention for long sequences: patterns say who attends to whom, backends compute it, chosen once and explained.

Importing this package imports neither torch nor numpy: every name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .core.version import VERSION

if TYPE_CHECKING:
    from . import errors, models, presets, reference, registry
    from . import metrics as metrics
    from .core.attention import Attention
    from .core.config import AttentionConfig
    from .core.context_parallel import ContextParallel
    from .core.counters import AttentionCounters
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
    from .core.head_shard import HeadShard
    from .core.limits import Limits
    from .core.model_counters import counters_of
    from .core.pattern import Full, Pattern, Sum, Union
    from .core.plan import AttentionPlan
    from .exchange.mesh import local_positions, shard_sequence, unshard_sequence
    from .exchange.rebuild import Membership, agree, rebuild
    from .patterns.dilated import Dilated
    from .patterns.global_tokens import Global
    from .patterns.learned import Learned
    from .patterns.local import Local
    from .patterns.random import Random
    from .patterns.store import PatternStore, load_pattern, save_pattern
    from .patterns.strided import Strided
    from .registry.build import build_attention, explain, preflight
    from .registry.patterns import resolve_pattern

__version__ = VERSION

# By the module that has them; `metrics` is not in `__all__` because it needs an extra.
_NAMES: dict[str, tuple[str, ...]] = {
    "core.attention": ("Attention",),
    "core.config": ("AttentionConfig",),
    "core.context_parallel": ("ContextParallel",),
    "core.counters": ("AttentionCounters",),
    "core.errors": (
        "ConfigError",
        "DilatedAttentionError",
        "NoBackendError",
        "PatternFileError",
        "PatternNotFoundError",
        "PluginError",
        "RingBroken",
        "UnsafePathError",
    ),
    "core.head_shard": ("HeadShard",),
    "core.limits": ("Limits",),
    "core.model_counters": ("counters_of",),
    "core.pattern": ("Full", "Pattern", "Sum", "Union"),
    "core.plan": ("AttentionPlan",),
    "exchange.mesh": ("local_positions", "shard_sequence", "unshard_sequence"),
    "exchange.rebuild": ("Membership", "agree", "rebuild"),
    "patterns.dilated": ("Dilated",),
    "patterns.global_tokens": ("Global",),
    "patterns.learned": ("Learned",),
    "patterns.local": ("Local",),
    "patterns.random": ("Random",),
    "patterns.store": ("PatternStore", "load_pattern", "save_pattern"),
    "patterns.strided": ("Strided",),
    "registry.build": ("build_attention", "explain", "preflight"),
    "registry.patterns": ("resolve_pattern",),
}
_MODULES = ("errors", "metrics", "models", "presets", "reference", "registry")
_HOMES = {name: home for home, names in _NAMES.items() for name in names}

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionCounters",
    "AttentionPlan",
    "ConfigError",
    "ContextParallel",
    "Dilated",
    "DilatedAttentionError",
    "Full",
    "Global",
    "HeadShard",
    "Learned",
    "Limits",
    "Local",
    "Membership",
    "NoBackendError",
    "Pattern",
    "PatternFileError",
    "PatternNotFoundError",
    "PatternStore",
    "PluginError",
    "Random",
    "RingBroken",
    "Strided",
    "Sum",
    "Union",
    "UnsafePathError",
    "__version__",
    "agree",
    "build_attention",
    "counters_of",
    "errors",
    "explain",
    "load_pattern",
    "local_positions",
    "models",
    "preflight",
    "presets",
    "rebuild",
    "reference",
    "registry",
    "resolve_pattern",
    "save_pattern",
    "shard_sequence",
    "unshard_sequence",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # so that the next use costs nothing
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
