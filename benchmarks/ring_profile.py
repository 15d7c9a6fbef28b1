"""Where a step over a ring of cards spends its time, beside the same work on one card alone.

python -m benchmarks.ring_profile [--output FOLDER]            two cards, the cases of `bench --scaling`
python -m benchmarks.ring_profile --device cpu --tokens 1024 --first 64 --heads 2 --dtype float32

Steps (forward and backward) are timed as `bench --scaling` does it, one by one between barriers; the two passes by
CUDA events; and many in a row without a barrier, as training runs them. Then some steps are traced, and of each rank
it is told how long the card computed, exchanged and idled, in which range of ours, and what the host did meanwhile.
With --output the traces' figures are kept as JSON. Results agree with the float64 oracle first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.ring_trace import STEP, gaps_of, kernels_of, steps_of, summarised, timeline_of
from dilated_attention import build_attention
from dilated_attention.bench.contenders import BOUNDS
from dilated_attention.bench.ring_settings import PATTERNS, RingSettings
from dilated_attention.bench.ring_worker import gate, seconds, seconds_in_a_row
from dilated_attention.bench.timing import Call, random_inputs, training
from dilated_attention.core.attention import Attention
from dilated_attention.core.config import AttentionConfig
from dilated_attention.registry.build import explain

_ROUNDS: Final = 15
_TRACED: Final = 4


def built_for(settings: RingSettings, mesh: DeviceMesh, kind: str) -> dict[str, Attention]:
    """The ring over all cards and one card alone with a rank's share, by one backend."""
    size = mesh.size()
    backend = explain(settings.config(kind, settings.weak_tokens * size, max(2, size))).backend
    assert backend is not None

    def config(tokens: int, ranks: int) -> AttentionConfig:
        return settings.config(kind, tokens, ranks, backend=backend)

    return {
        "ring": build_attention(config(settings.weak_tokens * size, size), mesh=mesh),
        "alone": build_attention(config(settings.weak_tokens, 1)),
    }


def in_turns(steps: dict[str, Call], settings: RingSettings) -> dict[str, float]:
    """Median milliseconds of single steps of the slowest rank, as `bench --scaling` takes them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(_ROUNDS + 3):
        for name, step in steps.items():
            taken = seconds(step, settings.device)
            if number >= 3:
                times[name].append(1e3 * taken)
    return {name: statistics.median(each) for name, each in times.items()}


def by_events(attention: Attention, inputs: list[Tensor]) -> dict[str, float]:
    """Median milliseconds of the forward and of the backward pass on this card, between CUDA events."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    times: list[tuple[float, float]] = []
    for _ in range(_ROUNDS):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]  # type: ignore[no-untyped-call]
        dist.barrier()
        torch.cuda.synchronize()
        marks[0].record()
        out = attention(*leaves)
        marks[1].record()
        torch.autograd.grad(out, leaves, inputs[3])
        marks[2].record()
        torch.cuda.synchronize()
        times.append((marks[0].elapsed_time(marks[1]), marks[1].elapsed_time(marks[2])))
    forward, backward = zip(*times, strict=True)
    return {"forward": statistics.median(forward), "backward": statistics.median(backward)}


def traced(step: Call, settings: RingSettings) -> dict[str, Any]:
    """What a trace of some steps says, each after a barrier."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (settings.device == "cuda")
    finish: Callable[[], object] = torch.cuda.synchronize if settings.device == "cuda" else lambda: None
    with profile(activities=activities, acc_events=True) as record:
        for _ in range(_TRACED + 1):
            dist.barrier()
            finish()
            with record_function(STEP):
                step()
                finish()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        steps = steps_of(json.loads(path.read_text())["traceEvents"])[1:]  # the first one meets the profiler
    return {
        "summary": summarised(steps),
        "kernels": kernels_of(steps),
        "gaps": gaps_of(steps[-1]),
        "timeline": timeline_of(steps[-1]),
    }


def measure(settings: RingSettings, mesh: DeviceMesh, kind: str) -> dict[str, Any]:
    """All figures of one pattern on this rank."""
    error = gate(settings, mesh, kind, hops=False)
    if not error < BOUNDS[settings.dtype]:
        sys.exit(f"{kind}: off the float64 oracle by {error:.1e}: no times")
    shape = (1, settings.weak_tokens, settings.num_heads, settings.head_dim)
    inputs = random_inputs(shape, settings.dtype, settings.device, seed=100 + mesh.get_rank())
    built = built_for(settings, mesh, kind)
    steps: dict[str, Call] = {name: training(attention, inputs) for name, attention in built.items()}
    times = in_turns(steps, settings)
    found: dict[str, Any] = {"error": error, "single": times}
    found["in a row"] = {name: 1e3 * seconds_in_a_row(step, settings.device) for name, step in steps.items()}
    if settings.device == "cuda":
        found["events"] = {name: by_events(attention, inputs) for name, attention in built.items()}
    return found | {"traced": {name: traced(step, settings) for name, step in steps.items()}}


def table_of(kind: str, ranks: list[dict[str, Any]]) -> str:
    """The figures of one pattern for people; microseconds a step where nothing else is said."""
    first = ranks[0][kind]
    single, row = first["single"], first["in a row"]
    lines = [
        f"== {kind}: {len(ranks)} ranks, off the oracle by {first['error']:.1e}",
        f"single steps  ring {single['ring']:.2f} ms, alone {single['alone']:.2f} ms, "
        f"efficiency {single['alone'] / single['ring']:.3f}",
        f"in a row      ring {row['ring']:.2f} ms, alone {row['alone']:.2f} ms, "
        f"efficiency {row['alone'] / row['ring']:.3f}",
    ]
    for rank, figures in enumerate(ranks):
        for name, times in figures[kind].get("events", {}).items():
            lines.append(f"rank {rank} {name}: forward {times['forward']:.2f} ms, backward {times['backward']:.2f} ms")
    keys = list(dict.fromkeys(k for one in ranks for t in one[kind]["traced"].values() for k in t["summary"]))
    columns = [
        (f"{name} {rank}", one[kind]["traced"][name]) for rank, one in enumerate(ranks) for name in one[kind]["traced"]
    ]
    lines.append("".ljust(34) + "".join(head.rjust(10) for head, _ in columns))
    for key in keys:
        cells = (f"{told['summary'][key]:10.0f}" if key in told["summary"] else "-".rjust(10) for _, told in columns)
        lines.append(key[:34].ljust(34) + "".join(cells))
    for rank, one in enumerate(ranks):
        told = one[kind]["traced"]["ring"]
        lines.append(f"-- ring, rank {rank}: kernels (range, kernel, a step, us)")
        lines += [f"{where[:16]:16} {what:44} {n:5.1f} {us:8.0f}" for where, what, n, us in told["kernels"][:14]]
        lines += [f"   idle at {at:.0f} for {us:.0f}: {a} -> {b}" for at, us, a, b in told["gaps"][:7]]
        lines.append("   host: " + "; ".join(f"{what} {at:.0f}+{us:.0f}" for at, us, what in told["timeline"][:14]))
    return "\n".join(lines)


def run_rank(settings: RingSettings, folder: Path) -> None:
    """Join, measure, write."""
    if settings.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if settings.device == "cuda" else "gloo")
    mesh = init_device_mesh(settings.device, (dist.get_world_size(),))
    for kind in PATTERNS:
        start = time.perf_counter()
        found = measure(settings, mesh, kind)
        found["took_s"] = time.perf_counter() - start
        (folder / f"{kind}-rank{mesh.get_rank()}.json").write_text(json.dumps({kind: found}, indent=1))
        dist.barrier()
        if mesh.get_rank() == 0:
            ranks = [json.loads((folder / f"{kind}-rank{r}.json").read_text()) for r in range(mesh.size())]
            print(table_of(kind, ranks), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def start(settings: RingSettings, folder: Path) -> int:
    """torchrun on this machine alone, at a port of its own."""
    path = folder / "settings.json"
    path.write_text(settings.to_json(), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(settings.sizes[0]), "-m", "benchmarks.ring_profile", "--rank-of", str(folder)]
    return subprocess.run(command, check=False).returncode


def main() -> None:
    """Start ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1 << 17, help="tokens a rank")
    parser.add_argument("--first", type=int, default=2048, help="LongNet's shortest segment")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, help="keep the figures of all ranks here")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of is not None:
        run_rank(RingSettings.from_json((args.rank_of / "settings.json").read_text()), args.rank_of)
        return
    settings = RingSettings(
        sizes=(args.ranks,), device=args.device, weak_tokens=args.tokens, strong_tokens=args.tokens * args.ranks,
        num_heads=args.heads, head_dim=args.head_dim, dtype=args.dtype, first=args.first,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        sys.exit(start(settings, folder))


if __name__ == "__main__":
    main()
