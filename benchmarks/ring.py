"""Weak scaling of a shared sequence: R ranks with R times the tokens against one with its share, forward + backward.

    torchrun --nproc-per-node 2 -m benchmarks.ring --device cuda                # 256K tokens on two, 128K on one
    torchrun --nproc-per-node 2 -m benchmarks.ring --device cuda --trace ring.json
    torchrun --nproc-per-node 4 -m benchmarks.ring --tokens 16384 --heads 4 --dtype float32 --rounds 3      # on CPUs

Causal LongNet (w = 2048 ... 32768, r = 1 ... 16) with one more branch over the whole sequence, r = tokens / 2048.
Nothing is timed before the ring's results and gradients agree with the float64 oracle on a short sequence. Beside it
stands the ring of old, in which all keys and values travel. The bytes counted are compared with the pre-flight's.
Every time is the slowest rank's; ways take turns; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dilated_attention import (
    AttentionConfig,
    ContextParallel,
    Dilated,
    Limits,
    build_attention,
    preflight,
    reference,
    shard_sequence,
)
from dilated_attention.core.attention import Attention
from dilated_attention.exchange.communicator import Counters
from dilated_attention.exchange.engine import RingEngine

BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
SHORT = 2048  # tokens of the comparison with the oracle


def longnet(tokens: int, first: int = 2048) -> Dilated:
    """The pattern for a whole sequence whose shortest segments are `first` long."""
    lengths = (*(first << i for i in range(5)), tokens)
    return Dilated(lengths, (1, 2, 4, 8, 16, max(1, tokens // first)))


def config_of(args: argparse.Namespace, tokens: int, size: int, *, hops: bool = False) -> AttentionConfig:
    """What is built: over `size` ranks, or alone where it is 1."""
    return AttentionConfig(
        pattern=longnet(tokens, 64 if tokens == SHORT else 2048),
        num_heads=args.heads,
        head_dim=args.head_dim,
        dtype=args.dtype,
        device=args.device,
        is_causal=True,
        context_parallel=ContextParallel(size=size, timeout_s=120),
        limits=Limits(exchange_buffer_bytes=1) if hops else Limits(),
    )


def tensors(args: argparse.Namespace, tokens: int, seed: int) -> list[Tensor]:
    """query, key, value and the gradient of out."""
    generator = torch.Generator(args.device).manual_seed(seed)
    dtype: torch.dtype = getattr(torch, args.dtype)
    shape = (1, tokens, args.heads, args.head_dim)
    return [torch.randn(shape, generator=generator, dtype=dtype, device=args.device) for _ in range(4)]


def gate(args: argparse.Namespace, mesh: DeviceMesh, *, hops: bool) -> float:
    """The worst error of out, dq, dk, dv of any rank against the oracle, on a short sequence."""
    config = config_of(args, SHORT, mesh.size(), hops=hops)
    attention = build_attention(config, mesh=mesh)
    whole = tensors(args, SHORT, 7)
    leaves = [shard_sequence(x, mesh).requires_grad_() for x in whole[:3]]
    out = attention(*leaves)
    found = [out, *torch.autograd.grad(out, leaves, shard_sequence(whole[3], mesh))]
    exact = [x.double().requires_grad_() for x in whole[:3]]
    expected, _ = reference.attention(exact[0], exact[1], exact[2], pattern=longnet_of(config), is_causal=True)
    truth = [expected, *torch.autograd.grad(expected, exact, whole[3].double())]
    errors = []
    for a, b in zip(found, truth, strict=True):
        mine = shard_sequence(b.detach(), mesh)
        error = float((a.detach().double() - mine).norm() / mine.norm())
        errors.append(error if error == error else float("inf"))
    worst = torch.tensor(max(errors), device=args.device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def longnet_of(config: AttentionConfig) -> Dilated:
    """The pattern of a config made here."""
    assert isinstance(config.pattern, Dilated)
    return config.pattern


def step_of(attention: Attention, inputs: list[Tensor]) -> Callable[[], None]:
    """One forward and backward."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]

    def step() -> None:
        torch.autograd.grad(attention(*leaves), leaves, inputs[3])

    return step


def seconds(step: Callable[[], None], device: str) -> float:
    """One timed call, of the slowest rank."""
    dist.barrier()
    before = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    taken = torch.tensor(time.perf_counter() - before, device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


def counters_of(attention: Attention) -> Counters:
    """A copy of what the attention's ring has counted."""
    engine = attention._engine
    assert isinstance(engine, RingEngine)
    return attrs.evolve(engine.communicator.counters)


def bytes_of_a_step(attention: Attention, step: Callable[[], None]) -> dict[str, int]:
    """What one step moves, by the counters."""
    before = counters_of(attention)
    step()
    after = counters_of(attention)
    names = ("forward_received", "forward_sent", "backward_received", "backward_sent")
    return {name: getattr(after, name) - getattr(before, name) for name in names}


def measure(args: argparse.Namespace, mesh: DeviceMesh) -> dict[str, object]:
    """All figures of this rank."""
    size, share = mesh.size(), args.tokens // mesh.size()
    errors = {name: gate(args, mesh, hops=hops) for name, hops in (("selective", False), ("full ring", True))}
    for name, error in errors.items():
        if not error < BOUNDS[args.dtype]:
            sys.exit(f"{name}: off the oracle by {error:.1e}, more than {BOUNDS[args.dtype]:.0e}; no times")
    ring = build_attention(config_of(args, args.tokens, size), mesh=mesh)
    full = build_attention(config_of(args, args.tokens, size, hops=True), mesh=mesh)
    alone = build_attention(config_of(args, share, 1))
    inputs = tensors(args, share, 100 + mesh.get_rank())
    steps = {"one rank": step_of(alone, inputs), "selective": step_of(ring, inputs), "full ring": step_of(full, inputs)}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(args.rounds + 2):
        for name, step in steps.items():
            taken = seconds(step, args.device)
            if round_number > 1:
                times[name].append(taken)
    medians = {name: statistics.median(found) for name, found in times.items()}
    costs = preflight(attrs.evolve(config_of(args, args.tokens, size), seq_len=args.tokens), ranks=size)
    moved = bytes_of_a_step(ring, steps["selective"])
    load = attrs.asdict(costs.loads[mesh.get_rank()])
    if args.trace:
        profile(steps["selective"], args, mesh.get_rank())
    return {
        "ranks": size,
        "tokens": args.tokens,
        "oracle_error": errors,
        "seconds": medians,
        "spread": {name: (min(found), max(found)) for name, found in times.items()},
        "efficiency": medians["one rank"] / medians["selective"],
        "bytes": moved,
        "bytes_as_planned": all(moved[name] == load[name] for name in moved),
        "fewer_than_a_full_ring": costs.saving,
        "waited_s": counters_of(ring).waited_s,
    }


def profile(step: Callable[[], None], args: argparse.Namespace, rank: int) -> None:
    """A trace of one step of this rank, in which communication kernels stand beside the local ones."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if args.device == "cuda" else []
    with torch.profiler.profile(activities=activities) as found:
        step()
        if args.device == "cuda":
            torch.cuda.synchronize()
    found.export_chrome_trace(str(args.trace.with_suffix(f".rank{rank}.json")))


def main() -> None:
    """Parse, measure, print on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 18, help="of the whole sequence")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(BOUNDS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--trace", type=Path, help="also write a profile of one step, a file a rank")
    args = parser.parse_args()
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    mesh = init_device_mesh(args.device, (dist.get_world_size(),))
    found = measure(args, mesh)
    every: list[dict[str, object]] = [{} for _ in range(mesh.size())]
    dist.all_gather_object(every, found)
    if mesh.get_rank() == 0:
        print(json.dumps({"torch": torch.__version__, "ranks": every}, indent=2))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
