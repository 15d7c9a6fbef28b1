"""The bytes that a run's counters show beside those that the pre-flight says for the same ring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from ..core.config import AttentionConfig
from ..registry.build import preflight
from ..registry.discovery import Registry


@attrs.frozen(kw_only=True)
class MeasuredRing:
    """One direction of one phase.

    Attributes:
        what: "forward, received", ...
        per_pass: bytes a pass, of the rank whose counters they are.
        least, most: bytes that the pre-flight says for the ranks of that ring.
        ranks: the simulated ranks that move exactly as many.
    """

    what: str
    per_pass: float
    least: int
    most: int
    ranks: tuple[int, ...]


def measured_ring(fields: Mapping[str, Any], counters: Mapping[str, Any], registry: Registry) -> list[MeasuredRing]:
    """Measured against simulated; nothing where the configuration has no ring or the counters have none of its bytes.

    The batch follows from the counters: queries a call over the rank's share of the sequence.
    """
    config = AttentionConfig.from_dict(dict(fields))
    forward = counters.get("forward")
    if config.ring_size == 1 or config.seq_len is None or not isinstance(forward, Mapping):
        return []
    calls, tokens = (_count(forward, name) for name in ("calls", "tokens"))
    shard = config.seq_len // config.ring_size
    if not calls or not shard or tokens % (calls * shard) or not tokens:
        return []
    cost = preflight(dict(fields), ranks=config.ring_size, batch=tokens // (calls * shard), registry=registry)
    found = []
    for phase in ("forward", "backward"):
        passes = counters.get(phase)
        times = _count(passes, "calls") if isinstance(passes, Mapping) else 0
        if not times or not isinstance(passes, Mapping):
            continue
        for way in ("received", "sent"):
            per_pass = _count(passes, f"{way}_bytes") / times
            loads = [int(getattr(load, f"{phase}_{way}")) for load in cost.loads]
            found.append(
                MeasuredRing(
                    what=f"{phase}, {way}",
                    per_pass=per_pass,
                    least=min(loads),
                    most=max(loads),
                    ranks=tuple(rank for rank, load in enumerate(loads) if load == per_pass),
                )
            )
    return found


def _count(counters: Mapping[str, Any], name: str) -> int:
    value = counters.get(name)
    return value if isinstance(value, int) and value >= 0 else 0
