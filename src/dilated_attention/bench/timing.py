"""Time, memory and error of one call. Imports nothing of ours: it also measures other versions of this package."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]
Clock = Callable[[], float]  # seconds
K = TypeVar("K", bound=Hashable)

_ROWS = 1 << 14  # compared at once, so that the comparison of long sequences takes no memory to speak of
_PRODUCT = {"cpu": 1024, "cuda": 8192}


def milliseconds(call: Call, device_type: str, *, clock: Clock = time.perf_counter) -> float:
    """One timed call: CUDA events around it on a GPU, else `clock`."""
    if device_type != "cuda":
        start = clock()
        call()
        return (clock() - start) * 1e3
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    elapsed: float = before.elapsed_time(after)
    return elapsed


def in_turns(
    calls: Mapping[K, Call], rounds: int, device_type: str, *, warm_up: int, clock: Clock = time.perf_counter
) -> dict[K, list[float]]:
    """Milliseconds of every call, in rounds in which all take turns, after `warm_up` rounds that do not count."""
    times: dict[K, list[float]] = {key: [] for key in calls}
    for number in range(warm_up + rounds):
        for key, call in calls.items():
            elapsed = milliseconds(call, device_type, clock=clock)
            if number >= warm_up:
                times[key].append(elapsed)
    return times


def extra_bytes(call: Call, device_type: str) -> int:
    """Peak memory of one call above what was held before, results included."""
    if device_type != "cuda":
        return peak_bytes(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # What was asked for. What was given is up to 1 MiB more for a tensor, by what other calls have let go of.
    counted = "requested_bytes" if torch.cuda.get_allocator_backend() == "native" else "allocated_bytes"
    held: int = torch.cuda.memory_stats()[f"{counted}.all.current"]
    call()
    torch.cuda.synchronize()
    peak: int = torch.cuda.memory_stats()[f"{counted}.all.peak"]
    return peak - held


def peak_bytes(call: Call) -> int:
    """The most memory that PyTorch's CPU allocator held at once during `call`, above what it held before.

    Read off the profiler's record of every allocation and release, so it is exact and does not depend on what the
    allocator or the operating system keep.
    """
    with (
        _without_profiler_lines(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record,
    ):
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


@contextmanager
def _without_profiler_lines() -> Iterator[None]:
    """Keep the profiler's own lines off stderr; others pass, a little later.

    It says that it starts and stops and, as a build for CUDA where there is no GPU, that it could not count them.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            for line in file:
                if not (line.startswith(b"USDT:") or b"] gpuGetDeviceCount failed" in line):
                    os.write(2, line)


def matrix_tflops(dtype: torch.dtype, device: torch.device | str) -> float:
    """The rate of a large matrix product on this device, now: the floor that everything is compared with.

    The best of several, since what slows one down is other work, and a floor is what nothing gets below.
    """
    device = torch.device(device)
    size = _PRODUCT.get(device.type, 1024)
    a = torch.randn(size, size, device=device).to(dtype)
    times = [milliseconds(lambda: a @ a, device.type) for _ in range(9)]
    return 2 * size**3 / min(times) / 1e9


def difference(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64; infinite where `actual` is not finite.

    Tensors are (B, S, ...) of one shape and are compared slice by slice along S.
    """
    if actual.shape != expected.shape:
        return math.inf
    off = norm = 0.0
    for a, e in zip(torch.split(actual, _ROWS, dim=1), torch.split(expected, _ROWS, dim=1), strict=True):
        a, e = a.detach().double(), e.detach().double()
        off += float((a - e).square().sum())
        norm += float(e.square().sum())
    if not (math.isfinite(off) and math.isfinite(norm)):
        return math.inf
    return math.sqrt(off / norm) if norm else math.sqrt(off)


def training(forward: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Sequence[Tensor]) -> Callable[[], object]:
    """Forward and backward of `forward` for query, key, value and the gradient of out."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    return lambda: torch.autograd.grad(forward(*leaves), leaves, inputs[3])


def random_inputs(
    shape: tuple[int, ...], dtype: str, device: str, *, seed: int = 0, kv_heads: int | None = None
) -> list[Tensor]:
    """query, key, value and the gradient of out, random; key and value with `kv_heads` heads where that is given."""
    generator = torch.Generator(device).manual_seed(seed)
    kind: torch.dtype = getattr(torch, dtype)
    kv_shape = shape if kv_heads is None else (*shape[:2], kv_heads, *shape[3:])
    shapes = (shape, kv_shape, kv_shape, shape)
    return [torch.randn(each, generator=generator, device=device).to(kind) for each in shapes]
