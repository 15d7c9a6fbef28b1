"""The patterns of this package, as manifests: nothing here imports them."""

from __future__ import annotations

from collections.abc import Iterable

from ..registry.hooks import hookimpl
from ..registry.specs import PatternSpec


@hookimpl
def dilated_attention_patterns() -> Iterable[PatternSpec]:
    """`Full` lives in core, whose default it is; unions and sums need no manifest."""
    return (
        PatternSpec(kind="full", target="dilated_attention.core.pattern:Full"),
        PatternSpec(kind="dilated", target="dilated_attention.patterns.dilated:Dilated"),
        PatternSpec(kind="local", target="dilated_attention.patterns.local:Local"),
        PatternSpec(kind="global", target="dilated_attention.patterns.global_tokens:Global"),
        PatternSpec(kind="strided", target="dilated_attention.patterns.strided:Strided"),
    )
