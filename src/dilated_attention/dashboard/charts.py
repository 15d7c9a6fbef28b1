"""The page's two interactive charts as Bokeh models. Colours and, for the history, data come from the script.

No text of a history reaches a model as markup or as a formula: titles and labels of axes are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, DataRange1d, FixedTicker, HoverTool, NumeralTickFormatter
from bokeh.models.renderers import DataRenderer
from bokeh.plotting import figure
from bokeh.resources import Resources

from ..core.explain import amount

if TYPE_CHECKING:
    from .machine import RingCost

_Axis: TypeAlias = Literal["linear", "log", "datetime"]

# A line's name, its field of a rank's load (None: the full ring), its marker and dash. Colours are the script's.
RING_LINES: Final = (
    ("received, forward", "forward_received", "circle", "solid"),
    ("received, backward", "backward_received", "square", "dashed"),
    ("peak memory", "peak_bytes", "triangle", "dotdash"),
    ("received in a full ring, forward", None, "diamond", "dotted"),
)


def library() -> str:
    """The script that draws the charts, as it comes with Bokeh."""
    (script,) = Resources(mode="inline", components=["bokeh"]).js_raw[:1]
    return str(script)


def history_chart() -> Any:
    """Runs of one case over time: lines, intervals, and a triangle on marked runs; the script fills it."""
    lines = _source("lines", ("xs", "ys", "color", "dash"))
    points = _source("points", ("x", "y", "low", "high", "color", "marker", "name", "when", "value", "commit", "said"))
    marks = _source("marks", ("x", "y", "color", "marker"))
    chart = _figure(360, "runs over time", "datetime", "linear")
    chart.x_range = DataRange1d(default_span=timedelta(days=1))  # the span of a single run
    chart.multi_line("xs", "ys", line_color="color", line_dash="dash", line_width=1.5, line_alpha=0.8, source=lines)
    chart.segment("x", "low", "x", "high", line_color="color", line_width=4, line_alpha=0.3, source=points)
    dots = chart.scatter("x", "y", size=7, marker="marker", color="color", source=points)
    chart.scatter("x", "y", size=18, marker="marker", color="color", fill_alpha=0, line_width=2.5, source=marks)
    rows = (("", "@name"), ("when", "@when"), ("value", "@value"), ("commit", "@commit"), ("", "@said"))
    _hover(chart, [dots], rows)
    return json_item(chart)


def ring_chart(costs: Iterable[RingCost]) -> Any:
    """Bytes of the busiest rank against the number of ranks, both axes logarithmic."""
    simulated = [cost for cost in costs if cost.cost is not None]
    chart = _figure(340, "bytes of the busiest rank", "log", "log")
    dots = []
    for index, (name, field, marker, dash) in enumerate(RING_LINES):
        points = [(cost.ranks, ring_bytes(cost, field)) for cost in simulated if ring_bytes(cost, field)]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        source = ColumnDataSource({"x": xs, "y": ys, "what": [name] * len(points)})
        line = chart.line("x", "y", line_width=2, line_dash=dash, source=source)
        dots.append(chart.scatter("x", "y", size=9, marker=marker, fill_alpha=0.25, line_width=2, source=source))
        line.tags = dots[-1].tags = [f"s{index}"]
    _hover(chart, dots, (("", "@what"), ("ranks", "@x{0,0}"), ("bytes", "@y{0,0}")))
    chart.xaxis.ticker = [cost.ranks for cost in simulated]
    chart.xaxis.formatter = NumeralTickFormatter(format="0,0")
    chart.xaxis.axis_label = "ranks that share the sequence"
    ticks = [digit * 10**power for power in range(16) for digit in (1, 2, 5)]
    chart.yaxis.ticker = FixedTicker(ticks=ticks)
    chart.yaxis.major_label_overrides = {tick: amount(tick, "B") for tick in ticks}
    return json_item(chart)


def ring_bytes(cost: RingCost, field: str | None) -> int:
    """What a line of `RING_LINES` says of a cost."""
    assert cost.cost is not None
    return cost.cost.full_ring_bytes if field is None else cost.most(field)


def _source(name: str, columns: Iterable[str]) -> ColumnDataSource:
    return ColumnDataSource({column: [] for column in columns}, name=name)


def _figure(height: int, label: str, x: _Axis, y: _Axis) -> figure:
    """No zoom by the wheel, which would catch whoever scrolls past."""
    chart = figure(height=height, x_axis_type=x, y_axis_type=y, tools="pan,box_zoom,reset")
    chart.sizing_mode = "stretch_width"
    chart.toolbar.logo = None
    chart.yaxis.axis_label = label
    return chart


def _hover(chart: figure, dots: Sequence[DataRenderer], rows: Iterable[tuple[str, str]]) -> None:
    chart.add_tools(HoverTool(renderers=[*dots], tooltips=list(rows), point_policy="snap_to_data"))
