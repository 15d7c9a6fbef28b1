"""Exact attention for long sequences: patterns say who attends to whom, backends compute it, chosen once and explained.

Importing this package imports neither torch nor numpy: every name below is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .core.version import VERSION

if TYPE_CHECKING:
    from . import errors, models, presets, reference, registry
    from .core.attention import Attention
    from .core.config import AttentionConfig
    from .core.context_parallel import ContextParallel
    from .core.counters import AttentionCounters
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

# Public name -> the module that has it; a name that stands for a module itself maps to None.
_HOMES: dict[str, str | None] = {
    "Attention": "core.attention",
    "AttentionConfig": "core.config",
    "AttentionCounters": "core.counters",
    "AttentionPlan": "core.plan",
    "ContextParallel": "core.context_parallel",
    "ConfigError": "core.errors",
    "Dilated": "patterns.dilated",
    "DilatedAttentionError": "core.errors",
    "Full": "core.pattern",
    "Global": "patterns.global_tokens",
    "Learned": "patterns.learned",
    "Limits": "core.limits",
    "Local": "patterns.local",
    "Membership": "exchange.rebuild",
    "NoBackendError": "core.errors",
    "Pattern": "core.pattern",
    "PatternFileError": "core.errors",
    "PatternStore": "patterns.store",
    "PluginError": "core.errors",
    "Random": "patterns.random",
    "RingBroken": "core.errors",
    "Strided": "patterns.strided",
    "Sum": "core.pattern",
    "Union": "core.pattern",
    "UnsafePathError": "core.errors",
    "agree": "exchange.rebuild",
    "build_attention": "registry.build",
    "counters_of": "core.model_counters",
    "errors": None,
    "explain": "registry.build",
    "load_pattern": "patterns.store",
    "local_positions": "exchange.mesh",
    "models": None,
    "preflight": "registry.build",
    "presets": None,
    "rebuild": "exchange.rebuild",
    "reference": None,
    "registry": None,
    "resolve_pattern": "registry.patterns",
    "save_pattern": "patterns.store",
    "shard_sequence": "exchange.mesh",
    "unshard_sequence": "exchange.mesh",
}

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
    "Learned",
    "Limits",
    "Local",
    "Membership",
    "NoBackendError",
    "Pattern",
    "PatternFileError",
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
