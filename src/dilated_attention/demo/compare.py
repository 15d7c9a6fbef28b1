"""LongNet's attention against dense attention: time, memory, and the error of each to the float64 oracle."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from .. import Attention, Dilated, build_attention, reference
from ..core.errors import DilatedAttentionError
from ..core.pattern import Full, Pattern

SEQ_LEN = 16_384
NUM_HEADS = 8
HEAD_DIM = 64
SEGMENT_LENGTHS = (1024, 2048, 4096, 8192)
DILATION_RATES = (1, 2, 4, 8)
# The oracle's masks grow with the square of the length: the same shape of pattern, a sixteenth of the size.
ORACLE_LEN = SEQ_LEN // 16
ERROR_LIMIT = 1e-5
REPEATS = 3

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@attrs.frozen
class Result:
    """One way to compute attention.

    Attributes:
        seconds: median of the forward passes at SEQ_LEN.
        peak_bytes: most that PyTorch's CPU allocator held during one of them, above the inputs.
        error: norm of the difference to the oracle over the oracle's norm, at ORACLE_LEN.
    """

    name: str
    seconds: float
    peak_bytes: int
    error: float


def pattern(shrink: int = 1) -> Dilated:
    """LongNet's configuration, its segments `shrink` times shorter."""
    return Dilated(segment_lengths=tuple(w // shrink for w in SEGMENT_LENGTHS), dilation_rates=DILATION_RATES)


def longnet(seq_len: int, *, shrink: int = 1) -> Attention:
    """The attention under test, its segments `shrink` times shorter."""
    return build_attention(
        pattern=pattern(shrink),
        num_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        is_causal=True,
        dtype="float32",
        device="cpu",
        seq_len=seq_len,
    )


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's own causal attention on (B, S, H, D)."""
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def inputs(seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (1, S, H, D), float32, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, seq_len, NUM_HEADS, HEAD_DIM, generator=generator)
    return query, key, value


def relative_error(call: Call, expected: Pattern) -> float:
    """Distance of `call` to the oracle of `expected`; an error where it is too large or not a number."""
    query, key, value = inputs(ORACLE_LEN)
    oracle, _ = reference.attention(query, key, value, pattern=expected, is_causal=True)
    error = float((call(query, key, value).double() - oracle).norm() / oracle.norm())
    if not error < ERROR_LIMIT:
        raise DilatedAttentionError(
            f"{expected!r} differs from the oracle by {error:.1e}, allowed is {ERROR_LIMIT:.0e}"
        )
    return error


def peak_bytes(call: Callable[[], object]) -> int:
    """The most memory that PyTorch's CPU allocator held at once during `call`, above what it held before.

    Read off the profiler's record of every allocation and release, so it is exact and does not depend on what the
    allocator or the operating system keep.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
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


@torch.no_grad()
def compare() -> list[Result]:
    """Measure both, taking turns, after checking that both are right."""
    attention = longnet(SEQ_LEN)
    shrink = SEQ_LEN // ORACLE_LEN
    small = longnet(ORACLE_LEN, shrink=shrink)
    errors = [relative_error(small, pattern(shrink)), relative_error(dense, Full())]
    calls: list[Call] = [attention, dense]
    query, key, value = inputs(SEQ_LEN)
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call(*inputs(ORACLE_LEN))  # threads and kernels are set up on the first call
    for _ in range(REPEATS):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call(query, key, value)
            taken.append(time.perf_counter() - start)
    names = ("LongNet, dilated-attention", "dense, PyTorch SDPA")
    return [
        Result(name, statistics.median(taken), peak_bytes(lambda call=call: call(query, key, value)), error)
        for name, call, taken, error in zip(names, calls, times, errors, strict=True)
    ]


def table(results: list[Result]) -> str:
    """The results as aligned text, the first row compared with the last."""
    rows = [("", "forward", "peak extra memory", "relative error")]
    rows += [(r.name, f"{r.seconds:.2f} s", f"{r.peak_bytes / 2**20:.0f} MiB", f"{r.error:.1e}") for r in results]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0].rstrip(), "-" * len(lines[0]), *lines[1:]])
