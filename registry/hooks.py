"""The hooks through which backends and patterns are found. Mark implementations with `hookimpl`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import pluggy

from .specs import BackendSpec, PatternSpec, Request

PROJECT: Final = "dilated_attention"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def dilated_attention_backends() -> Iterable[BackendSpec]:  # type: ignore[empty-body]
    """Return the manifests of the backends that a plugin brings.

    Called once, at discovery. Import neither torch nor a kernel library here: a `BackendSpec` names its code as a
    string, which is imported when a request passes its capabilities.
    """


@hookspec
def dilated_attention_patterns() -> Iterable[PatternSpec]:  # type: ignore[empty-body]
    """Return the manifests of the patterns that a plugin brings, under the rules of `dilated_attention_backends`."""


@hookspec(firstresult=True)
def dilated_attention_rank_backends(request: Request, candidates: Sequence[BackendSpec]) -> Sequence[str] | None:
    """Return names of `candidates`, the best first, or None to leave the order to others.

    Asked with `backend="auto"` only. `candidates` are the specs of the usable backends by descending priority, among
    them, for a card that is not here, those that could not be judged; those that the answer leaves out follow in that
    order. The first plugin with an answer decides.
    """
