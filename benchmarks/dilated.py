"""Dilated attention against the bare kernels, the official algorithm and dense attention, in one interleaved run.

    python -m benchmarks.dilated                                  the CPU case at 16K tokens
    python -m benchmarks.dilated --seq-len 65536 --no-dense
    python -m benchmarks.dilated --device cuda --seq-len 131072 --heads 16 --dtype bfloat16 \
        --segment-lengths 2048,4096,8192,16384,32768 --dilation-rates 1,2,4,8,16

Every contender is checked against the float64 oracle at a length where that fits, and against ours at the full length;
one that fails prints no time.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Literal

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from dilated_attention import Attention, AttentionConfig, Dilated, build_attention, reference
from dilated_attention.backends.aten import CpuFlash, CudaCudnn, CudaEfficient, CudaFlash
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import DenseKernel, DensePiece
from dilated_attention.core.schedule import schedule
from dilated_attention.demo.memory import peak_bytes

from .torchscale_algorithm import dilated_attention

_aten = torch.ops.aten
_KERNELS: dict[str, DenseKernel] = {k.name: k for k in (CpuFlash(), CudaCudnn(), CudaFlash(), CudaEfficient())}
ORACLE_TOKENS = 1024
BOUNDS = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3}


@attrs.frozen
class Case:
    """What is computed: one batch row of dilated attention."""

    seq_len: int
    heads: int
    head_dim: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    dtype: str
    device: str
    backend: str = "sdpa"
    kernel: str = ""
    is_causal: bool = True
    offsets: Literal["interleaved", "blocked"] = (
        "blocked"  # those of the official code, so that results can be compared
    )

    @property
    def pattern(self) -> Dilated:
        """All heads use every branch."""
        return Dilated(self.segment_lengths, self.dilation_rates, offsets=self.offsets)

    def inputs(self) -> list[Tensor]:
        """query, key, value and the gradient of out, all random."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (1, self.seq_len, self.heads, self.head_dim)
        dtype: torch.dtype = getattr(torch, self.dtype)
        return [torch.randn(shape, generator=generator, dtype=dtype, device=self.device) for _ in range(4)]

    def config(self) -> AttentionConfig:
        """What is asked for."""
        return AttentionConfig(
            pattern=self.pattern,
            num_heads=self.heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
            is_causal=self.is_causal,
            backend=self.backend,
            backend_options={self.backend: {"kernel": self.kernel}} if self.kernel else {},
        )

    def attention(self) -> Attention:
        """Ours."""
        return build_attention(self.config())


@attrs.frozen
class Contender:
    """`forward()`, `training()` for forward and backward, and its `out()` where that is comparable to ours."""

    name: str
    forward: Callable[[], object]
    training: Callable[[], object]
    out: Callable[[], Tensor] | None


def _differentiable(kernel: DenseKernel) -> Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]:
    """aten's differentiable form of a kernel of ours."""

    def run(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        if query.device.type == "cpu":
            op = _aten._scaled_dot_product_flash_attention_for_cpu.default
            out, lse = op(query, key, value, 0.0, is_causal)
        elif kernel.name == "cudnn":
            op = _aten._scaled_dot_product_cudnn_attention.default
            out, lse, *_ = op(query, key, value, None, True, 0.0, is_causal, False)
            lse = lse.squeeze(-1)
        else:
            op = _aten._scaled_dot_product_flash_attention.default
            out, lse, *_ = op(query, key, value, 0.0, is_causal, False)
        return out, lse

    return run


def trained(forward: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Forward and backward of `forward` for query, key, value and the gradient of out."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    return lambda: torch.autograd.grad(forward(*leaves), leaves, inputs[3])


def bare(case: Case, kernel: DenseKernel, inputs: list[Tensor]) -> Contender:
    """The kernel calls alone, on inputs that were made compact beforehand, nothing merged: the floor of composing."""
    geometry = Geometry.self_attention(case.seq_len, case.heads, is_causal=case.is_causal)
    calls = []
    for call in schedule(case.pattern.branches(geometry), geometry).calls:
        views = []
        for x, rows in zip(inputs, (call.query, call.key, call.key, call.query), strict=True):
            s_row, s_head = x.stride(1), x.stride(2)
            size = (call.segments, rows.count, rows.num_heads, case.head_dim)
            stride = (
                rows.segment_step * s_row,
                rows.step * s_row,
                rows.head_step * s_head + rows.head_shift * s_row,
                1,
            )
            views.append(x.as_strided(size, stride, rows.start * s_row + rows.head * s_head))
        compact = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]
        calls.append((DensePiece(is_causal=call.is_causal, scale=1 / math.sqrt(case.head_dim)), compact))

    def forward() -> list[tuple[Tensor, Tensor]]:
        return [kernel.forward(q, k, v, piece) for piece, (q, k, v, _) in calls]

    def training() -> None:
        for piece, (q, k, v, dout) in calls:
            out, lse = kernel.forward(q, k, v, piece)
            kernel.backward(dout, q, k, v, out, lse, piece)

    return Contender(f"bare {kernel.name}, compact inputs", forward, training, None)


def official(case: Case, kernel: DenseKernel, inputs: list[Tensor]) -> Contender:
    """The official algorithm over the same kernel."""
    run = _differentiable(kernel)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rates = case.dilation_rates
        return dilated_attention(q, k, v, case.segment_lengths, rates, is_causal=case.is_causal, kernel=run)

    def out() -> Tensor:
        return attend(*inputs[:3])

    return Contender(f"official algorithm ({kernel.name})", out, trained(attend, inputs), out)


def contenders(case: Case, *, dense: bool) -> list[Contender]:
    """Ours first."""
    inputs = case.inputs()
    query, key, value, _ = inputs
    attention = case.attention()
    kernel = _KERNELS[attention.plan.kernel]

    def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        swapped = [x.transpose(1, 2) for x in (q, k, v)]
        return functional.scaled_dot_product_attention(swapped[0], swapped[1], swapped[2], is_causal=case.is_causal)

    def ours() -> Tensor:
        out: Tensor = attention(query, key, value)
        return out

    found = [
        Contender(f"ours ({kernel.name})", ours, trained(attention, inputs), ours),
        bare(case, kernel, inputs),
        official(case, kernel, inputs),
    ]
    if dense:
        inputs_bhsd = [*inputs[:3], inputs[3].transpose(1, 2)]
        found.append(Contender("dense SDPA", lambda: full(query, key, value), trained(full, inputs_bhsd), None))
    return found


def difference(a: Tensor, b: Tensor) -> float:
    """Relative difference of two tensors; infinite where a is not finite."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm()) if bool(torch.isfinite(a).all()) else math.inf


def gate(case: Case) -> float:
    """Our error against the oracle, out and gradients, on segments scaled down to a length where that fits."""
    shrink = max(1, max(case.segment_lengths) // (ORACLE_TOKENS // 2))
    lengths = tuple(
        max(rate, width // shrink) for width, rate in zip(case.segment_lengths, case.dilation_rates, strict=True)
    )
    small = attrs.evolve(case, seq_len=ORACLE_TOKENS, segment_lengths=lengths)
    inputs = small.inputs()
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = small.attention()(*leaves)
    actual = [out, *torch.autograd.grad(out, leaves, inputs[3])]
    exact = [x.detach().double().requires_grad_() for x in inputs[:3]]
    expected, _ = reference.attention(exact[0], exact[1], exact[2], pattern=small.pattern, is_causal=case.is_causal)
    grads = torch.autograd.grad(expected, exact, inputs[3].double())
    return max(difference(a.detach(), e.detach()) for a, e in zip(actual, [expected, *grads], strict=True))


def milliseconds(call: Callable[[], object], device: str) -> float:
    """One timed call."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    before.record()
    call()
    after.record()
    torch.cuda.synchronize()
    elapsed: float = before.elapsed_time(after)
    return elapsed


def extra_bytes(call: Callable[[], object], device: str) -> int:
    """Peak memory of one call above what was held before, results included."""
    if device == "cpu":
        return peak_bytes(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def measure(case: Case, *, dense: bool, rounds: int) -> list[dict[str, object]]:
    """Interleaved medians of every contender, and their ratio to ours."""
    error = gate(case)
    if not error < BOUNDS[case.dtype]:
        sys.exit(f"ours differs from the oracle by {error:.1e}, more than {BOUNDS[case.dtype]:.0e}: no times")
    found = contenders(case, dense=dense)
    ours = found[0].forward()
    assert isinstance(ours, Tensor)
    for contender in found[1:]:
        if contender.out is not None and not difference(contender.out(), ours) < BOUNDS[case.dtype]:
            sys.exit(f"{contender.name} computes something else: no times")
    calls = {(c.name, kind): call for c in found for kind, call in (("forward", c.forward), ("training", c.training))}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for round_number in range(rounds + 1):
        for key, call in calls.items():
            elapsed = milliseconds(call, case.device)
            if round_number:  # the first round warms up
                times[key].append(elapsed)
    rows: list[dict[str, object]] = []
    for contender in found:
        row: dict[str, object] = {"name": contender.name, "oracle_error": error if contender is found[0] else None}
        for kind in ("forward", "training"):
            mine = times[contender.name, kind]
            row |= {f"{kind}_ms": statistics.median(mine), f"{kind}_spread": (min(mine), max(mine))}
            row[f"{kind}_ratio"] = statistics.median(mine) / statistics.median(times[found[0].name, kind])
            row[f"{kind}_bytes"] = extra_bytes(calls[contender.name, kind], case.device)
        rows.append(row)
    return rows


def numbers(text: str) -> tuple[int, ...]:
    """The integers of "1,2,4"."""
    return tuple(int(part) for part in text.split(","))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--segment-lengths", type=numbers, default=(1024, 2048, 4096, 8192))
    parser.add_argument("--dilation-rates", type=numbers, default=(1, 2, 4, 8))
    parser.add_argument("--dtype", default="float32", choices=sorted(BOUNDS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-dense", action="store_true", help="leave dense attention out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    case = Case(
        args.seq_len, args.heads, args.head_dim, args.segment_lengths, args.dilation_rates, args.dtype, args.device
    )
    rows = measure(case, dense=not args.no_dense, rounds=args.rounds)
    if args.json:
        print(json.dumps({"case": attrs.asdict(case), "torch": torch.__version__, "rows": rows}, indent=2))
        return
    print(
        f"{case}\n"
        f"error against the float64 oracle at {ORACLE_TOKENS} tokens, out and gradients: {rows[0]['oracle_error']:.1e}"
    )
    print(f"{'':44}{'forward ms':>12}{'/ ours':>8}{'f+b ms':>10}{'/ ours':>8}{'fwd MiB':>10}{'f+b MiB':>10}")
    for row in rows:
        print(
            f"{row['name']:44}{row['forward_ms']:12.2f}{row['forward_ratio']:8.2f}{row['training_ms']:10.2f}"
            f"{row['training_ratio']:8.2f}{row['forward_bytes'] / 2**20:10.1f}{row['training_bytes'] / 2**20:10.1f}"  # type: ignore[operator]
        )


if __name__ == "__main__":
    main()
