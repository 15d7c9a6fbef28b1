"""What composing costs: dilated attention against the bare calls of the same kernel, which merge nothing.

    python -m benchmarks.dilated                                  the CPU case at 16K tokens
    python -m benchmarks.dilated --case longnet-128k --backend sdpa:cudnn

The bare calls get inputs that were made compact beforehand. Ours passes the gate of `dilated-attention bench` before it
is timed; the two take turns.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from dilated_attention import ConfigError
from dilated_attention.backends.aten import CpuFlash, CudaCudnn, CudaEfficient, CudaFlash
from dilated_attention.bench.cases import CASES, BenchCase
from dilated_attention.bench.contenders import Gate, ours
from dilated_attention.bench.history import PHASES
from dilated_attention.bench.timing import extra_bytes, in_turns
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import DenseKernel, DensePiece
from dilated_attention.core.schedule import schedule

_KERNELS: dict[str, DenseKernel] = {k.name: k for k in (CpuFlash(), CudaCudnn(), CudaFlash(), CudaEfficient())}


def bare(case: BenchCase, kernel: DenseKernel, inputs: list[Tensor]) -> dict[str, Callable[[], object]]:
    """The kernel's calls alone: the floor of composing."""
    geometry = Geometry.self_attention(case.seq_len, case.num_heads, is_causal=case.is_causal)
    branches = case.pattern.branches(geometry)
    if branches is None:
        raise ConfigError(f"{case.name} is no sum of strided branches, and has no bare dense calls")
    calls = []
    for call in schedule(branches, geometry).calls:
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

    def forward() -> None:
        for piece, (q, k, v, _) in calls:
            kernel.forward(q, k, v, piece)

    def training() -> None:
        for piece, (q, k, v, dout) in calls:
            out, lse = kernel.forward(q, k, v, piece)
            kernel.backward(dout, q, k, v, out, lse, piece)

    return {"forward": forward, "training": training}


def measure(case: BenchCase, backend: str, device: str, rounds: int) -> list[dict[str, object]]:
    """Interleaved medians, and the ratio of each to ours."""
    gate = Gate(case, device, case.inputs(device))
    found = ours(gate, [backend], lambda line: print(line, file=sys.stderr))
    if not found or found[0].kernel not in _KERNELS:
        sys.exit("\n".join(gate.failures) or f"{backend} does not run {case.name} on a kernel of aten's")
    kernel = _KERNELS[found[0].kernel]
    calls: dict[str, dict[str, Callable[[], object]]] = {
        f"ours ({kernel.name})": {phase: getattr(found[0], phase) for phase in PHASES},
        f"bare {kernel.name}, compact inputs": bare(case, kernel, gate.inputs),
    }
    kind = device.partition(":")[0]
    each_phase = {(name, phase): calls[name][phase] for name in calls for phase in PHASES}
    times = in_turns(each_phase, rounds, kind, warm_up=1)
    medians = {key: statistics.median(each) for key, each in times.items()}
    first = next(iter(calls))
    return [
        {
            "name": name,
            "oracle_error": found[0].error if name == first else None,
            **{f"{phase}_ms": medians[name, phase] for phase in PHASES},
            **{f"{phase}_ratio": medians[name, phase] / medians[first, phase] for phase in PHASES},
            **{f"{phase}_bytes": extra_bytes(calls[name][phase], kind) for phase in PHASES},
        }
        for name in calls
    ]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="longnet-16k", choices=sorted(CASES))
    parser.add_argument("--backend", default="sdpa", help="sdpa, or sdpa:KERNEL on a GPU")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    case = CASES[args.case]
    rows = measure(case, args.backend, case.device, args.rounds)
    if args.json:
        print(json.dumps({"case": case.to_dict(), "torch": torch.__version__, "rows": rows}, indent=2))
        return
    print(
        f"{case}\nerror against the oracle at {case.gate_len} tokens, out and gradients: {rows[0]['oracle_error']:.1e}"
    )
    print(f"{'':44}{'forward ms':>12}{'/ ours':>8}{'f+b ms':>10}{'/ ours':>8}{'fwd MiB':>10}{'f+b MiB':>10}")
    for row in rows:
        print(
            f"{row['name']:44}{row['forward_ms']:12.2f}{row['forward_ratio']:8.2f}{row['training_ms']:10.2f}"
            f"{row['training_ratio']:8.2f}{row['forward_bytes'] / 2**20:10.1f}{row['training_bytes'] / 2**20:10.1f}"  # type: ignore[operator]
        )


if __name__ == "__main__":
    main()
