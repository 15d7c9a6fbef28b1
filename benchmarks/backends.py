"""Dilated attention by every backend that takes it here, in one interleaved run: LongNet's case, forward and backward.

    python -m benchmarks.backends
    python -m benchmarks.backends --seq-len 32768 --backend fa3 --backend sdpa:cudnn
    python -m benchmarks.backends --load-library libcudart.so.12 --load-library flash_attn_3_C.so

Each is checked against the float64 oracle at a length where that fits, and against the first at the full length; one
that fails prints no time. `--load-library` serves operators that no installed package brings.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
from collections.abc import Callable

import attrs
import torch
from torch import Tensor

from dilated_attention import Attention, explain
from dilated_attention.backends.aten import CudaFlash
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.lowering import lower

from .dilated import (
    BOUNDS,
    ORACLE_TOKENS,
    Case,
    difference,
    extra_bytes,
    gate,
    milliseconds,
    numbers,
    official,
    trained,
)

# Kernels among which a backend chooses; each is measured.
_KERNELS = {"sdpa": ("cudnn", "flash"), "xformers": ("flash", "cutlass")}


@attrs.frozen(eq=False)
class Runner:
    """One backend's attention with its inputs, having passed the gate.

    Attributes:
        case: what is computed, and by which backend and kernel.
        attention: it.
        inputs: query, key, value and the gradient of out.
        error: out and gradients against the oracle.
    """

    case: Case
    attention: Attention
    inputs: list[Tensor]
    error: float

    def forward(self) -> Tensor:
        """Inference."""
        with torch.no_grad():
            out: Tensor = self.attention(*self.inputs[:3])
        return out


def usable(case: Case) -> list[str]:
    """`backend` or `backend:kernel` of all that take the case, and a line on stderr for each that does not."""
    plan = explain(case.config(), backend="auto")
    names: list[str] = []
    for row in plan.rows:
        if row.status not in ("chosen", "usable"):
            print(f"{row.name}: {'; '.join(map(str, row.refusals)) or row.detail}", file=sys.stderr)
        elif row.name != "reference":
            names += [f"{row.name}:{kernel}" for kernel in _KERNELS.get(row.name, ())] or [row.name]
    print(f"auto picks {plan.backend}: {plan.kernel}", file=sys.stderr)
    return names


def runners(case: Case, names: list[str]) -> list[Runner]:
    """Those that agree with the oracle and with the first at the full length."""
    found: list[Runner] = []
    first: Tensor | None = None
    inputs = case.inputs()
    for name in names:
        backend, _, kernel = name.partition(":")
        mine = attrs.evolve(case, backend=backend, kernel=kernel)
        error = gate(mine)
        if not error < BOUNDS[case.dtype]:
            print(f"{name}: differs from the oracle by {error:.1e}: no times", file=sys.stderr)
            continue
        runner = Runner(mine, mine.attention(), inputs, error)
        out = runner.forward()
        if first is not None and not difference(out, first) < BOUNDS[case.dtype]:
            print(f"{name}: differs from {names[0]} at {case.seq_len} tokens: no times", file=sys.stderr)
            continue
        first = out if first is None else first
        found.append(runner)
    return found


def measure(case: Case, names: list[str], rounds: int) -> list[dict[str, object]]:
    """Interleaved medians in milliseconds, TFLOP/s of the pairs that the pattern counts, and peak memory."""
    found = runners(case, names)
    calls: dict[tuple[int, str], Callable[[], object]] = {}
    for i, runner in enumerate(found):
        calls[i, "forward"] = runner.forward
        calls[i, "training"] = trained(runner.attention, runner.inputs)
    peer = official(case, CudaFlash(), case.inputs()) if _has_peer(case) else None
    if peer is not None:
        calls[-1, "forward"], calls[-1, "training"] = peer.forward, peer.training
    times: dict[tuple[int, str], list[float]] = {key: [] for key in calls}
    for round_number in range(rounds + 2):
        for key, call in calls.items():
            elapsed = milliseconds(call, case.device)
            if round_number > 1:  # the first rounds warm up
                times[key].append(elapsed)
    geometry = Geometry.self_attention(case.seq_len, case.heads, is_causal=case.is_causal)
    flops = 4 * case.head_dim * lower(case.pattern, geometry).pairs
    rows: list[dict[str, object]] = []
    named = [(i, r.case.backend, r.attention.plan.kernel, r.error) for i, r in enumerate(found)]
    if peer is not None and peer.out is not None:
        named.append((-1, "official algorithm", "FlashAttention-2", difference(peer.out(), found[0].forward())))
    for i, name, kernel, error in named:
        row: dict[str, object] = {"name": name, "kernel": kernel, "oracle_error": error}
        for kind, factor in (("forward", 1.0), ("training", 3.5)):
            mine = times[i, kind]
            middle = statistics.median(mine)
            row |= {f"{kind}_ms": middle, f"{kind}_spread": (min(mine), max(mine))}
            row[f"{kind}_tflops"] = factor * flops / middle / 1e9
            row[f"{kind}_bytes"] = extra_bytes(calls[i, kind], case.device)
        rows.append(row)
    return rows


def _has_peer(case: Case) -> bool:
    """Whether the official code computes the same: it has its own offsets, and attends to padding."""
    divides = all(
        case.seq_len % w == 0 and w % r == 0 for w, r in zip(case.segment_lengths, case.dilation_rates, strict=True)
    )
    return case.device.startswith("cuda") and case.offsets == "blocked" and divides


def floors(case: Case) -> str:
    """The forward pass at the rate of a large matrix product, measured now, for the multiset and for distinct pairs."""
    size = 8192
    a = torch.randn(size, size, device=case.device, dtype=getattr(torch, case.dtype))
    times = sorted(milliseconds(lambda: a @ a, case.device) for _ in range(12))
    rate = 2 * size**3 / times[len(times) // 2] / 1e9
    layout = lower(case.pattern, Geometry.self_attention(case.seq_len, case.heads, is_causal=case.is_causal))
    each = [4 * case.head_dim * pairs / rate / 1e9 for pairs in (layout.pairs, layout.distinct_pairs)]
    return f"floor at {rate:.0f} TFLOP/s (matrix product): {each[0]:.2f} ms forward, {each[1]:.2f} for distinct pairs"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", action="append", help="backend or backend:kernel; by default all that fit")
    parser.add_argument("--load-library", action="append", default=[], help="load this library first")
    parser.add_argument("--seq-len", type=numbers, default=(32768, 131072, 524288), help="one or several")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--segment-lengths", type=numbers, default=(2048, 4096, 8192, 16384, 32768))
    parser.add_argument("--dilation-rates", type=numbers, default=(1, 2, 4, 8, 16))
    parser.add_argument("--offsets", default="interleaved", choices=("interleaved", "blocked"))
    parser.add_argument("--no-causal", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(BOUNDS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="one line of JSON for each length")
    args = parser.parse_args()
    for path in args.load_library:
        if "libcudart" in path:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        else:
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    for seq_len in args.seq_len:
        case = Case(
            seq_len, args.heads, args.head_dim, args.segment_lengths, args.dilation_rates, args.dtype, args.device
        )
        case = attrs.evolve(case, is_causal=not args.no_causal, offsets=args.offsets)
        rows = measure(case, args.backend or usable(case), args.rounds)
        if args.json:
            print(json.dumps({"case": attrs.asdict(case), "torch": torch.__version__, "rows": rows}))
            continue
        print(f"{case}\n{floors(case)}\nerrors against the float64 oracle at {ORACLE_TOKENS} tokens, out and gradients")
        print(f"{'':44}{'error':>9}{'fwd ms':>9}{'TFLOP/s':>9}{'MiB':>8}{'f+b ms':>9}{'TFLOP/s':>9}{'MiB':>8}")
        for row in rows:
            print(_line(row))


def _line(row: dict[str, object]) -> str:
    text = f"{row['name']}: {row['kernel']}"[:43]
    line = f"{text:44}{row['oracle_error']:9.1e}"
    for kind in ("forward", "training"):
        mebibytes = float(str(row[f"{kind}_bytes"])) / 2**20
        line += f"{row[f'{kind}_ms']:9.2f}{row[f'{kind}_tflops']:9.0f}{mebibytes:8.0f}"
    return line


if __name__ == "__main__":
    main()
