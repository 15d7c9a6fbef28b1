"""The counters of many attentions at once: of a model's, or of all that are alive in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from torch import nn

from .attention import Attention
from .counters import AttentionCounters
from .engine import Engine
from .errors import ConfigError
from .ops import living_engines


@runtime_checkable
class BuildsAttentions(Protocol):
    """A module that keeps attentions which are none of its submodules, because it shares them with others, say."""

    def built_attentions(self) -> Sequence[Attention]:
        """Those that it has built by now."""


def counters_of(*modules: nn.Module) -> tuple[AttentionCounters, ...]:
    """What the attentions in `modules` have done, one for each plan, in the order in which plans are met.

    Without modules: all attentions that are alive in this process, those that `register_with_transformers` keeps
    outside of modules included, in the order of their plans' digests.
    """
    if not modules:
        return tuple(sorted(_by_plan(living_engines()), key=lambda counters: counters.plan))
    for module in modules:
        if not isinstance(module, nn.Module):
            raise ConfigError(f"counters_of takes torch modules, or nothing for all attentions, got {module!r}")
    parts = (part for module in modules for part in module.modules())
    return _by_plan(dict.fromkeys(attention._engine for part in parts for attention in _attentions_of(part)))


def _attentions_of(part: nn.Module) -> Iterator[Attention]:
    if isinstance(part, Attention):
        yield part
    elif isinstance(part, BuildsAttentions):
        yield from part.built_attentions()


def _by_plan(engines: Iterable[Engine]) -> tuple[AttentionCounters, ...]:
    """Several engines have one plan where ranks share sequences over more than one mesh."""
    found: dict[str, AttentionCounters] = {}
    for engine in engines:
        counters = engine.counters()
        found[counters.plan] = found[counters.plan] + counters if counters.plan in found else counters
    return tuple(found.values())
