"""Pattern mappings of config files, `{kind = "dilated", ...}`, turned into patterns by what plugins brought."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeGuard

import attrs

from ..core.checks import MOST_NESTED, did_you_mean
from ..core.errors import ConfigError, DilatedAttentionError, PluginError
from ..core.head_shard import HeadShard
from ..core.pattern import Pattern, Sum, Union
from ..core.structure import check_keys, from_mapping
from .discovery import Registry, default_registry
from .plugins import PLUGIN_FAULTS, describe, import_target

_PRESETS: Final = ("bigbird", "longformer")  # what people know as patterns, and functions make of ours
_COMPOSITES: Final[Mapping[str, type[Union] | type[Sum]]] = {"union": Union, "sum": Sum}
_ALGEBRA: Final = (*_COMPOSITES, HeadShard.kind)  # core's own, made of other patterns


def resolve_pattern(pattern: Pattern | Mapping[str, Any], registry: Registry | None = None) -> Pattern:
    """The pattern that a mapping describes; a pattern is returned as it is.

    Args:
        pattern: a mapping with `kind`, as files and `AttentionConfig.to_dict()` hold it.
        registry: where kinds are looked up; by default the process's own.

    Raises:
        ConfigError: for an unknown kind or parameter, naming the nearest right one, or a value not allowed.
        PluginError: when the plugin that brings the kind is at fault.
    """
    return _resolved(pattern, registry or default_registry(), 0)


def _resolved(pattern: Pattern | Mapping[str, Any], registry: Registry, depth: int) -> Pattern:
    """`resolve_pattern` inside `depth` unions, sums and shards."""
    if isinstance(pattern, Pattern):
        return pattern
    if depth > MOST_NESTED:
        raise ConfigError(f"patterns may be nested {MOST_NESTED} deep, these are deeper")
    if not isinstance(pattern, Mapping) or not isinstance(pattern.get("kind"), str):
        raise ConfigError(
            f"a pattern is a value such as Dilated(...), or a mapping with 'kind', its name; got {pattern!r}"
        )
    kind: str = pattern["kind"]
    parameters = {name: value for name, value in pattern.items() if name != "kind"}
    if kind in _COMPOSITES:
        return _composite(kind, parameters, registry, depth)
    if kind == HeadShard.kind:
        if "of" in parameters:
            parameters["of"] = _resolved(parameters["of"], registry, depth + 1)
        return from_mapping(HeadShard, parameters, name=f"pattern {kind!r}")
    if kind not in registry.patterns:
        kinds = (*registry.patterns, *_ALGEBRA)
        hint = f" ({kind} in dilated_attention.presets makes one)" if kind in _PRESETS else did_you_mean(kind, kinds)
        raise ConfigError(f"unknown pattern {kind!r}{hint}; known are {', '.join(sorted(kinds))}")
    registered = registry.patterns[kind]
    try:
        cls = import_target(registered.spec.target)
    except PluginError as error:
        raise PluginError(f"pattern {kind!r} of {registered.source.origin}: {error}") from error
    if not _is_pattern_class(cls):
        raise PluginError(
            f"pattern {kind!r} of {registered.source.origin}: {registered.spec.target} is no attrs class derived "
            f"from Pattern but {cls!r}"
        )
    try:
        return from_mapping(cls, parameters, name=f"pattern {kind!r}")
    except DilatedAttentionError:
        raise
    except PLUGIN_FAULTS as error:  # its class failed in a way that is not about the user's values
        raise PluginError(f"pattern {kind!r} of {registered.source.origin} raised {describe(error)}") from error


def _is_pattern_class(found: object) -> TypeGuard[type[Pattern]]:
    return isinstance(found, type) and issubclass(found, Pattern) and attrs.has(found)


def _composite(kind: str, parameters: Mapping[str, Any], registry: Registry, depth: int) -> Pattern:
    check_keys(parameters, ("of",), name=f"pattern {kind!r}")
    members = parameters.get("of")
    if not isinstance(members, list | tuple):
        raise ConfigError(f"pattern {kind!r} needs 'of', a list of patterns, got {members!r}")
    resolved: tuple[Pattern, ...] = tuple(_resolved(member, registry, depth + 1) for member in members)
    return _COMPOSITES[kind](resolved)
