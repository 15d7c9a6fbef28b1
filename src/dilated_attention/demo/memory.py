"""How much memory a call needs at most, exactly."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that PyTorch's CPU allocator held at once during `call`, above what it held before.

    Read off the profiler's record of every allocation and release, so it is exact and does not depend on what the
    allocator or the operating system keep.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    moves = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    held = peak = 0
    for _, moved in moves:
        held += moved
        peak = max(peak, held)
    return peak
