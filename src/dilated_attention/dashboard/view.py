"""A history as the page shows it: rows of tables as text, and series as the script reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import attrs

from ..core.explain import amount, counted
from .series import Group, Point, Series, moment, newest, short, thin

LATEST_ROWS: Final = 150
MARKED_ROWS: Final = 100
RUN_ROWS: Final = 100
_DRAWN: Final = (1e-9, 1e15)  # what an axis can be labelled with; a table says any number


@attrs.frozen(kw_only=True)
class Row:
    """One newest result, in words.

    Attributes:
        series: which it is the last of.
        time, interval: milliseconds.
        time_share: of the slowest way of the same case and phase.
        rate: TFLOP/s.
        floor_share: of the rate of a matrix product; None where that was not measured.
        versus: "1.83 x" against the fastest peer of the same run.
        memory, memory_versus: the same of peak memory.
        memory_share: of the largest of the same case and phase.
    """

    series: Series
    time: str
    interval: str
    time_share: float
    rate: str
    floor_share: float | None
    versus: str
    memory: str
    memory_versus: str
    memory_share: float

    @property
    def point(self) -> Point:
        """The result."""
        return self.series.points[-1]

    @property
    def mark(self) -> str:
        """The last mark of the series, and how long ago, or nothing."""
        mark, ago = self.series.recent
        return f"{mark}, {counted(ago, 'run')} ago" if ago else mark


def latest_rows(group: Group) -> list[Row]:
    """The newest result of each way of a case, forward first, ours first, fastest first."""
    ways = newest(group)
    slowest: dict[str, float] = {}
    largest: dict[str, float] = {}
    for series in ways:
        phase, result = series.phase, series.points[-1].result
        slowest[phase] = max(slowest.get(phase, 0.0), result.median_ms)
        largest[phase] = max(largest.get(phase, 1.0), result.peak_bytes or 0)
    return [_row(series, slowest[series.phase], largest[series.phase]) for series in ways]


def marked_rows(groups: Iterable[Group]) -> list[tuple[Group, Series, Point]]:
    """All marked runs of ours, the newest first."""
    found = [
        (group, series, point)
        for group in groups
        for series in group.series
        for point in series.points
        if point.mark and not series.peer
    ]
    return sorted(found, key=lambda entry: moment(entry[2].run.when), reverse=True)


def run_rows(groups: Iterable[Group]) -> list[tuple[Group, Series, Point]]:
    """All runs, the newest first."""
    found = [(group, series, point) for group in groups for series in group.series for point in series.points]
    return sorted(found, key=lambda entry: moment(entry[2].run.when), reverse=True)


def group_data(group: Group) -> dict[str, Any]:
    """What the script needs of a group."""
    return {
        "label": f"{short(group.case)} · {short(group.machine)}",
        "note": group.workload,
        "leftOut": group.left_out,
        "series": [_series_data(series) for series in group.series],
    }


def milliseconds(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f} ms" if 1000 <= value < 1e15 else f"{value:.3g} ms"


def interval_words(point: Point) -> str:
    """The quartiles."""
    low, high = (milliseconds(value).removesuffix(" ms") for value in (point.result.low_ms, point.result.high_ms))
    return f"{low} to {high}"


def when_words(point: Point) -> str:
    """Day and minute, UTC."""
    return point.run.when[:16].replace("T", " ")


def commit_words(point: Point) -> str:
    """The commit's first digits, and whether there were changes besides."""
    commit = short(point.run.commit or "")[:10] or "no commit"
    return f"{commit} + changes" if point.run.modified else commit


def _row(series: Series, slowest: float, largest: float) -> Row:
    point = series.points[-1]
    result = point.result
    ratio, memory_ratio = point.speedup, point.memory_ratio
    return Row(
        series=series,
        time=milliseconds(result.median_ms),
        interval=interval_words(point),
        time_share=result.median_ms / slowest,
        rate="-" if result.tflops is None else f"{result.tflops:.3g}",
        floor_share=result.floor_share,
        versus="-" if ratio is None else f"{ratio:.3g} ×",
        memory="-" if result.peak_bytes is None else amount(result.peak_bytes, "B"),
        memory_versus="-" if memory_ratio is None else f"{memory_ratio:.3g} ×",
        memory_share=(result.peak_bytes or 0) / largest,
    )


def _series_data(series: Series) -> dict[str, Any]:
    kept = thin(series.points)
    results = [point.result for point in kept]
    return {
        "name": short(series.backend),
        "phase": series.phase,
        "peer": series.peer,
        "versions": short(series.versions),
        "runs": len(series.points),
        "x": [round(moment(point.run.when) * 1000) for point in kept],
        "ms": [_drawn(result.median_ms) for result in results],
        "low": [_drawn(result.low_ms) for result in results],
        "high": [_drawn(result.high_ms) for result in results],
        "tflops": [_drawn(result.tflops) for result in results],
        "floor": [_drawn(result.floor_share) for result in results],
        "memory": [_drawn(result.peak_bytes) for result in results],
        "peerRatio": [_drawn(point.speedup) for point in kept],
        "mark": [point.mark for point in kept],
        "commit": [commit_words(point) for point in kept],
    }


def _drawn(value: float | None) -> float | None:
    """The value to six digits, or None where no axis could show it."""
    if value is None or not (_DRAWN[0] <= value <= _DRAWN[1]):
        return 0.0 if value == 0 else None
    return float(f"{value:.6g}")
