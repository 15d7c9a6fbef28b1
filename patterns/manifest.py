"""The patterns of this package, as manifests: nothing here imports one."""

from __future__ import annotations

from collections.abc import Iterable

from ..registry.hooks import hookimpl
from ..registry.specs import PatternSpec

FULL = PatternSpec(kind="full", target="dilated_attention.core.pattern:Full")
DILATED = PatternSpec(kind="dilated", target="dilated_attention.patterns.dilated:Dilated")
LOCAL = PatternSpec(kind="local", target="dilated_attention.patterns.local:Local")
GLOBAL = PatternSpec(kind="global", target="dilated_attention.patterns.global_tokens:Global")
STRIDED = PatternSpec(kind="strided", target="dilated_attention.patterns.strided:Strided")
RANDOM = PatternSpec(kind="random", target="dilated_attention.patterns.random:Random")
LEARNED = PatternSpec(kind="learned", target="dilated_attention.patterns.learned:Learned")
STORED = PatternSpec(kind="stored", target="dilated_attention.patterns.store:Stored")


@hookimpl
def dilated_attention_patterns() -> Iterable[PatternSpec]:
    """The generators and what was stored of them; unions and sums of them belong to core's algebra."""
    return (FULL, DILATED, LOCAL, GLOBAL, STRIDED, RANDOM, LEARNED, STORED)
