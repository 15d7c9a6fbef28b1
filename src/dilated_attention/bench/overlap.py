"""How much of the exchange is hidden behind computing: from a profile on CUDA, from forced waiting elsewhere."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..exchange.communicator import Communicator
from ..exchange.transport import Pending, Transport
from .timing import Call

Interval = tuple[float, float]


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The union of intervals, as intervals that do not touch."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def common(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """The length of what two unions of intervals share."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        total += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total


def hidden_in_trace(events: Iterable[dict[str, Any]]) -> tuple[float, float | None]:
    """Seconds of NCCL's kernels in a trace of torch's profiler, and the share during which others computed.

    A kernel of NCCL's also waits for its peers in that time. The share is None where there was no exchange.
    """
    kernels = [e for e in events if e.get("cat") == "kernel"]
    spans: dict[bool, list[Interval]] = {True: [], False: []}
    for event in kernels:
        spans["nccl" in event["name"].lower()].append((event["ts"], event["ts"] + event["dur"]))
    exchange, computing = merged(spans[True]), merged(spans[False])
    length = sum(end - start for start, end in exchange)
    return length / 1e6, common(exchange, computing) / length if length else None


def hidden_on_cuda(step: Call, trace: Path | None) -> tuple[float, float | None]:
    """`hidden_in_trace` of one step; the trace is kept where a path is given."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as record:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = trace or Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        return hidden_in_trace(json.loads(path.read_text())["traceEvents"])


class _Done:
    """Messages that have been waited for already."""

    def wait(self, deadline: float) -> None:
        """See `Pending`."""


class _WaitingTransport:
    """A transport whose messages are waited for as they are posted, so that nothing hides them."""

    def __init__(self, inner: Transport, timeout_s: float) -> None:
        self._inner = inner
        self._timeout_s = timeout_s
        self.seconds = 0.0

    @property
    def is_guarded(self) -> bool:
        """See `Transport`."""
        return self._inner.is_guarded

    @property
    def launches_first(self) -> bool:
        """See `Transport`."""
        return self._inner.launches_first

    def mark(self) -> object:
        """See `Transport`."""
        return self._inner.mark()

    def aside(self, after: object = None) -> AbstractContextManager[None]:
        """See `Transport`."""
        return self._inner.aside(after)

    def rejoin(self) -> None:
        """See `Transport`."""
        self._inner.rejoin()

    def post(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Pending:
        """See `Transport`."""
        start = time.perf_counter()
        self._inner.post(sends, receives).wait(time.monotonic() + self._timeout_s)
        self.seconds += time.perf_counter() - start
        return _Done()

    def close(self) -> None:
        """See `Transport`."""
        self._inner.close()


def exposed_exchange(communicator: Communicator, step: Call, rounds: int) -> float:
    """Seconds a step's exchange takes on a CPU where every message is waited for as it is posted."""
    inner = communicator.transport
    waiting = _WaitingTransport(inner, communicator.timeout_s)
    communicator.transport = waiting
    try:
        for _ in range(rounds):
            step()
    finally:
        communicator.transport = inner
    return waiting.seconds / rounds
