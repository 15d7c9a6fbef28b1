"""Reads a trace of torch's profiler: when the card was busy with what, and which part of a ring's pass launched it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Final

import attrs

from dilated_attention.bench.overlap import common, merged

STEP: Final = "profiled step"
# Our ranges around what a pass does; the host's time in them is of interest, and what they launch belongs to them.
_RANGES: Final = ("dilated_attention ", "ring ", "own keys", "received keys", "rows ")
_ON_DEVICE: Final = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_LAUNCHES: Final = frozenset({"cuda_runtime", "cuda_driver"})
_GAP_US: Final = 15.0
_NOISE: Final = frozenset({"void", "at", "native", "anonymous", "namespace", "unnamed", "static", "const"})
_TELLING: Final = re.compile(r"Functor|_kernel_cuda|lerp|sigmoid|copy|fill|index|cat|reduce|where|nan_to_num|logaddexp")


@attrs.frozen
class Range:
    """A named stretch of a host thread's time, in microseconds."""

    name: str
    start: float
    end: float
    thread: object


@attrs.frozen
class Work:
    """A kernel, copy or fill on the device, in microseconds; `inside` is our range that launched it."""

    name: str
    start: float
    end: float
    inside: str

    @property
    def is_exchange(self) -> bool:
        """It is NCCL's."""
        return "nccl" in self.name.lower()


@attrs.frozen
class Step:
    """One step of a trace."""

    start: float
    end: float
    ranges: tuple[Range, ...]
    work: tuple[Work, ...]


def steps_of(events: Iterable[dict[str, Any]]) -> list[Step]:
    """The steps of a trace, which are its ranges named `STEP` and end with the device's work."""
    spans, launches, device = [], {}, []
    for event in events:
        kind, arguments = event.get("cat"), event.get("args", {})
        if kind == "user_annotation" and event["name"].startswith((*_RANGES, STEP)):
            spans.append(Range(event["name"], event["ts"], event["ts"] + event["dur"], event["tid"]))
        elif kind in _LAUNCHES and "correlation" in arguments:
            launches[arguments["correlation"]] = event["ts"], event["tid"]
        elif kind in _ON_DEVICE:
            device.append(event)
    found = []
    for step in sorted((span for span in spans if span.name == STEP), key=lambda span: span.start):
        inside = [s for s in spans if s is not step and step.start <= s.start < step.end]
        work = [e for e in device if step.start <= e["ts"] < step.end]
        told = tuple(_work(event, inside, launches) for event in sorted(work, key=lambda event: event["ts"]))
        found.append(Step(step.start, step.end, tuple(sorted(inside, key=lambda span: span.start)), told))
    return found


def _work(event: dict[str, Any], spans: Sequence[Range], launches: dict[Any, tuple[float, object]]) -> Work:
    launched, thread = launches.get(event.get("args", {}).get("correlation"), (None, None))
    around = [s for s in spans if launched is not None and s.thread == thread and s.start <= launched < s.end]
    innermost = max(around, key=lambda span: span.start).name if around else "elsewhere"
    return Work(event["name"], event["ts"], event["ts"] + event["dur"], plain_range(innermost))


def plain_range(name: str) -> str:
    """A range's name without what differs from plan to plan."""
    found = re.match(r"dilated_attention \S+ (.*?)(?: \(plan.*)?$", name)
    return found[1] if found else re.sub(r"ring step (\d+) receive.*", r"ring step \1", name)


def plain_kernel(name: str) -> str:
    """A kernel's name in a few words: its function, and of PyTorch's templates the functor."""
    words = [word for word in re.findall(r"[A-Za-z_]\w+", name) if word not in _NOISE]
    if not words:
        return name[:44]
    functor = next((word for word in words[1:] if _TELLING.search(word) and word != words[0]), None)
    return (words[0] if functor is None else f"{words[0]}:{functor}")[:44]


def summarised(steps: Sequence[Step]) -> dict[str, float]:
    """Microseconds a step, means: of the device as a whole, of parts of its work, and of the host in our ranges."""
    totals: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        totals[name] = totals.get(name, 0.0) + value / len(steps)

    for step in steps:
        computing = merged((w.start, w.end) for w in step.work if not w.is_exchange)
        exchange = merged((w.start, w.end) for w in step.work if w.is_exchange)
        busy = sum(end - start for start, end in computing)
        add("step", step.end - step.start)
        add("device: computing", busy)
        add("device: NCCL", sum(end - start for start, end in exchange))
        add("device: NCCL while computing", common(exchange, computing))
        if computing:
            add("device: before the first kernel", computing[0][0] - step.start)
            add("device: idle between kernels", computing[-1][1] - computing[0][0] - busy)
            add("device: after the last kernel", step.end - computing[-1][1])
        for work in step.work:
            if not work.is_exchange:
                add(f"device in {work.inside}", work.end - work.start)
        for span in step.ranges:
            add(f"host in {plain_range(span.name)}", span.end - span.start)
    return totals


def kernels_of(steps: Sequence[Step]) -> list[tuple[str, str, float, float]]:
    """(range, kernel, how many a step, microseconds a step), the longest first."""
    found: dict[tuple[str, str], list[float]] = {}
    for step in steps:
        for work in step.work:
            found.setdefault((work.inside, plain_kernel(work.name)), []).append(work.end - work.start)
    rows = [(*key, len(each) / len(steps), sum(each) / len(steps)) for key, each in found.items()]
    return sorted(rows, key=lambda row: -row[3])


def gaps_of(step: Step) -> list[tuple[float, float, str, str]]:
    """(when it began in the step, how long, what ran before, what ran after) where the card computed nothing."""
    found, last, name = [], step.start, "the step's beginning"
    for work in step.work:
        if work.is_exchange:
            continue
        if work.start - last > _GAP_US:
            found.append((last - step.start, work.start - last, name, plain_kernel(work.name)))
        if work.end > last:
            last, name = work.end, plain_kernel(work.name)
    if step.work and step.end - last > _GAP_US:
        found.append((last - step.start, step.end - last, name, "the step's end"))
    return found


def timeline_of(step: Step) -> list[tuple[float, float, str]]:
    """(when it began in the step, how long, our range) of the host, in order."""
    return [(span.start - step.start, span.end - span.start, plain_range(span.name)) for span in step.ranges]
