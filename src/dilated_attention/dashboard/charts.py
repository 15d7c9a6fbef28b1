"""What the script draws of a ring; a history's lines are `view.group_data`. Colours are the style sheet's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .machine import RingCost

# A line's name, its field of a rank's load (None: the full ring), its marker and dash.
RING_LINES: Final = (
    ("received, forward", "forward_received", "circle", "solid"),
    ("received, backward", "backward_received", "square", "dashed"),
    ("peak memory", "peak_bytes", "triangle", "dotdash"),
    ("received in a full ring, forward", None, "diamond", "dotted"),
)


def ring_data(costs: Iterable[RingCost]) -> dict[str, Any] | None:
    """Bytes of the busiest rank against the number of ranks; None where nothing could be simulated."""
    simulated = [cost for cost in costs if cost.cost is not None]
    if not simulated:
        return None
    lines = []
    for index, (name, field, marker, dash) in enumerate(RING_LINES):
        points = [(cost.ranks, ring_bytes(cost, field)) for cost in simulated]
        shown = [(ranks, count) for ranks, count in points if count]  # an axis of powers has no place for 0
        xs, ys = [ranks for ranks, _ in shown], [count for _, count in shown]
        lines.append({"name": name, "colour": f"s{index}", "marker": marker, "dash": dash, "x": xs, "y": ys})
    return {"ranks": [cost.ranks for cost in simulated], "lines": lines}


def ring_bytes(cost: RingCost, field: str | None) -> int:
    """What a line of `RING_LINES` says of a cost."""
    assert cost.cost is not None
    return cost.cost.full_ring_bytes if field is None else cost.most(field)
