"""LongNet's attention against dense attention: time, memory, and the error of each to the float64 oracle."""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .. import Attention, Dilated, build_attention, reference
from ..bench.timing import peak_bytes
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
NAMES = ("LongNet, dilated-attention", "dense, PyTorch SDPA")

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
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


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


@torch.no_grad()
def compare() -> list[Result]:
    """Measure both, taking turns, after checking that both are right."""
    attention = longnet(SEQ_LEN)
    shrink = SEQ_LEN // ORACLE_LEN
    small = longnet(ORACLE_LEN, shrink=shrink)
    errors = [relative_error(small, pattern(shrink)), relative_error(dense, Full())]
    calls: Sequence[Call] = (attention, dense)
    query, key, value = inputs(SEQ_LEN)
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call(*inputs(ORACLE_LEN))  # threads and kernels are set up on the first call
    for _ in range(REPEATS):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call(query, key, value)
            taken.append(time.perf_counter() - start)
    columns = zip(NAMES, times, peaks_in_a_child(), errors, strict=True)
    return [Result(name, statistics.median(taken), peak, error) for name, taken, peak, error in columns]


@torch.no_grad()
def peaks() -> list[int]:
    """Peak bytes of one forward pass of each, in the order of NAMES."""
    calls: Sequence[Call] = (longnet(SEQ_LEN), dense)
    query, key, value = inputs(SEQ_LEN)
    for call in calls:
        call(*inputs(ORACLE_LEN))
    return [peak_bytes(functools.partial(call, query, key, value)) for call in calls]


def peaks_in_a_child() -> list[int]:
    """`peaks` in a process of its own: the profiler writes lines of its own to the terminal, which nobody asked for."""
    code = "import json; from dilated_attention.demo.compare import peaks; print(json.dumps(peaks()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DilatedAttentionError(f"the memory could not be measured: {done.stderr.strip()}")
    result: list[int] = json.loads(done.stdout)
    return result


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
