"""What the page's two interactive charts need: Bokeh's scripts, and the ring's lines. The page's script draws them.

Bokeh's models are made by its JavaScript interface, in the browser: to import them here would take most of a page's
time. No text of a history reaches a model as markup or as a formula: titles and labels of axes are ours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..core.explain import amount

if TYPE_CHECKING:
    from .machine import RingCost

_SCRIPTS: Final = ("bokeh.min.js", "bokeh-api.min.js")

# A line's name, its field of a rank's load (None: the full ring), its marker and dash. Colours are the script's.
RING_LINES: Final = (
    ("received, forward", "forward_received", "circle", "solid"),
    ("received, backward", "backward_received", "square", "dashed"),
    ("peak memory", "peak_bytes", "triangle", "dotdash"),
    ("received in a full ring, forward", None, "diamond", "dotted"),
)


def library() -> str:
    """The scripts that draw the charts, as they come with Bokeh."""
    found = importlib.util.find_spec("bokeh")
    assert found is not None
    assert found.submodule_search_locations is not None
    folder = Path(found.submodule_search_locations[0]) / "server" / "static" / "js"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in _SCRIPTS)


def ring_chart(costs: Iterable[RingCost]) -> dict[str, Any]:
    """Bytes of the busiest rank against the number of ranks: the lines of `RING_LINES`, and how amounts are written."""
    simulated = [cost for cost in costs if cost.cost is not None]
    lines = []
    for name, field, marker, dash in RING_LINES:
        points = [(cost.ranks, ring_bytes(cost, field)) for cost in simulated if ring_bytes(cost, field)]
        line = {"name": name, "marker": marker, "dash": dash, "x": [x for x, _ in points], "y": [y for _, y in points]}
        lines.append(line)
    ticks = [digit * 10**power for power in range(16) for digit in (1, 2, 5)]
    return {
        "lines": lines,
        "ranks": [cost.ranks for cost in simulated],
        "ticks": [[tick, amount(tick, "B")] for tick in ticks],
    }


def ring_bytes(cost: RingCost, field: str | None) -> int:
    """What a line of `RING_LINES` says of a cost."""
    assert cost.cost is not None
    return cost.cost.full_ring_bytes if field is None else cost.most(field)
