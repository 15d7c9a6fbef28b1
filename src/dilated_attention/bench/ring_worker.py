"""One rank of a scaling run; started by torchrun: `-m dilated_attention.bench.ring_worker SETTINGS.json FOLDER`.

Results must agree with the float64 oracle on a short sequence before anything is timed. Every time is the slowest
rank's; what is compared takes turns. Each rank writes rank0.json, rank1.json, ... into the folder.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..core.attention import Attention
from ..core.config import AttentionConfig
from ..core.pattern import Pattern
from ..exchange.communicator import Communicator
from ..exchange.engine import RingEngine
from ..exchange.mesh import shard_sequence
from ..registry.build import build_attention, explain, preflight
from .contenders import BOUNDS
from .longest import longest_layer
from .oracle import truth
from .overlap import exposed_exchange, hidden_on_cuda
from .ring_settings import PATTERNS, RingSettings
from .timing import Call, difference, extra_bytes, random_inputs, training

SHORT = 1024  # tokens of the comparison with the oracle
_SHORT_STEP_S = 1.0
IN_A_ROW = 8
_MOVED = ("forward_received", "forward_sent", "backward_received", "backward_sent")


def gate(settings: RingSettings, mesh: DeviceMesh, kind: str, *, hops: bool) -> float:
    """The worst error of out, dq, dk and dv of any rank against the oracle, on a short sequence."""
    tokens = SHORT - SHORT % mesh.size()
    config = settings.config(kind, tokens, mesh.size(), hops=hops, first=SHORT // 32)
    attention = build_attention(config, mesh=mesh)
    whole = random_inputs((1, tokens, settings.num_heads, settings.head_dim), settings.dtype, settings.device, seed=7)
    leaves = [shard_sequence(x, mesh).requires_grad_() for x in whole[:3]]
    out = attention(*leaves)
    found = [out, *torch.autograd.grad(out, leaves, shard_sequence(whole[3], mesh))]
    assert isinstance(config.pattern, Pattern)
    expected = truth(whole, config.pattern, is_causal=True)
    errors = [difference(a, shard_sequence(e, mesh)) for a, e in zip(found, expected, strict=True)]
    return _largest(max(errors), settings.device)


def _largest(number: float, device: str) -> float:
    """The largest of all ranks' numbers."""
    value = torch.tensor(number, device=device, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def seconds(step: Call, device: str) -> float:
    """One timed call, of the slowest rank."""
    dist.barrier()
    before = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return _largest(time.perf_counter() - before, device)


def seconds_in_a_row(step: Call, device: str, rounds: int = 3) -> float:
    """One call of several that follow each other as in training, with no barrier between; the best round."""

    def several() -> None:
        for _ in range(IN_A_ROW):
            step()

    return min(seconds(several, device) for _ in range(rounds)) / IN_A_ROW


def interleaved(steps: dict[str, Call], settings: RingSettings) -> dict[str, list[float]]:
    """Seconds of every step, in rounds; the first two, or one, warm up. All ranks do as many: they share the times."""
    spent = 0.0
    for warm_up in range(2):
        if warm_up == 0 or spent < _SHORT_STEP_S:  # what takes long is warm after one
            spent = sum(seconds(step, settings.device) for step in steps.values())
    rounds = min(settings.rounds, max(3, int(settings.seconds / max(spent, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, settings.device))
    return times


def ring_of(attention: Attention) -> Communicator:
    """What an attention over a ring exchanges with."""
    engine = attention._engine
    assert isinstance(engine, RingEngine)
    return engine.communicator


def weighed(attention: Attention, step: Call, device: str) -> tuple[int, dict[str, int]]:
    """Peak memory of one step above what was held, and the bytes that it moves on this rank, by the counters."""
    if attention.config.ring_size == 1:
        return extra_bytes(step, device), {}
    before = attrs.evolve(ring_of(attention).counters)
    peak = extra_bytes(step, device)
    after = ring_of(attention).counters
    return peak, {name: getattr(after, name) - getattr(before, name) for name in _MOVED}


def measure(settings: RingSettings, mesh: DeviceMesh, kind: str, tokens: int, share: int) -> dict[str, Any]:
    """One pattern over one whole sequence of `tokens`.

    Where a rank's part is `share` tokens, a rank that has these tokens alone takes turns with it: by the same backend,
    and by what `auto` picks for one rank where that is another.
    """
    size = mesh.size()
    config = settings.config(kind, tokens, size)
    inputs = random_inputs(
        (1, tokens // size, settings.num_heads, settings.head_dim), settings.dtype, settings.device,
        seed=100 + mesh.get_rank(),
    )  # fmt: skip
    # What a ring can use, for one rank too: else the sizes would differ in more than their ranks.
    backend = explain(settings.config(kind, tokens, max(2, size))).backend
    assert backend is not None
    ring = build_attention(attrs.evolve(config, backend=backend), mesh=mesh if size > 1 else None)
    built = {"ring": ring}
    if size > 1 and kind == "longnet":
        hops = attrs.evolve(settings.config(kind, tokens, size, hops=True), backend=backend)
        built["full ring"] = build_attention(hops, mesh=mesh)
    if share == tokens // size:  # the same work without any other rank
        if size > 1:
            built["alone"] = build_attention(settings.config(kind, share, 1, backend=backend))
        auto = build_attention(settings.config(kind, share, 1))
        if auto.plan.backend != backend:
            built["alone, auto"] = auto
    steps: dict[str, Call] = {name: training(attention, inputs) for name, attention in built.items()}
    times = interleaved(steps, settings)
    in_a_row = {
        name: seconds_in_a_row(step, settings.device, min(3, settings.rounds))
        for name, step in steps.items()
        if name in ("ring", "alone")
    }
    peak, moved = weighed(ring, steps["ring"], settings.device)
    found: dict[str, Any] = {
        "pattern": kind,
        "tokens": tokens,
        "backends": {name: f"{one.plan.backend}: {one.plan.kernel}" for name, one in built.items()},
        "seconds": {name: statistics.median(each) for name, each in times.items()},
        "spread": {name: (min(each), max(each)) for name, each in times.items()},
        "rounds": len(times["ring"]),
        "seconds_in_a_row": in_a_row,
        "peak_bytes": peak + sum(x.nbytes for x in inputs),
    }
    if size > 1:
        found |= {"bytes": moved} | _exchanged(settings, mesh, ring, steps["ring"], config, tokens)
        if "full ring" in built:
            found["full_ring_bytes"] = weighed(built["full ring"], steps["full ring"], settings.device)[1]
    return found


def _exchanged(
    settings: RingSettings, mesh: DeviceMesh, ring: Attention, step: Call, config: AttentionConfig, tokens: int
) -> dict[str, Any]:
    """What the pre-flight says of this rank, and how much of the exchange is hidden."""
    costs = preflight(attrs.evolve(config, seq_len=tokens, context_parallel=None), ranks=mesh.size())
    load = costs.loads[mesh.get_rank()]
    found: dict[str, Any] = {
        "planned_bytes": {name: getattr(load, name) for name in _MOVED},
        "planned_peak_bytes": load.peak_bytes,
        "mode": costs.mode,
        "fewer_than_a_full_ring": costs.saving,
    }
    if settings.device == "cuda":
        trace = None
        if settings.trace is not None:
            trace = Path(settings.trace) / f"{_kind(config)}-{tokens}-rank{mesh.get_rank()}.json"
        hidden_on_cuda(step, None)  # the first profile of a process holds up some ranks more than others
        dist.barrier()
        exchange, hidden = hidden_on_cuda(step, trace)
        return found | {"exchange_s": exchange, "hidden_share": hidden, "hidden_from": "trace"}
    communicator = ring_of(ring)
    exposed = exposed_exchange(communicator, step, 3)
    before = communicator.counters.waited_s
    for _ in range(3):
        step()
    waited = (communicator.counters.waited_s - before) / 3
    hidden = max(0.0, 1 - waited / exposed) if exposed else None
    return found | {"exchange_s": exposed, "waited_s": waited, "hidden_share": hidden, "hidden_from": "waiting"}


def _kind(config: AttentionConfig) -> str:
    """The kind of a config's pattern, for the name of a file."""
    assert isinstance(config.pattern, Pattern)
    return config.pattern.kind


def run(settings: RingSettings, mesh: DeviceMesh) -> dict[str, Any]:
    """All figures of this rank."""
    size = mesh.size()
    errors = {}
    if size > 1:
        for kind in PATTERNS:
            for name, hops in ((kind, False), (f"{kind}, full ring", True)):
                errors[name] = gate(settings, mesh, kind, hops=hops)
                if not errors[name] < BOUNDS[settings.dtype]:
                    sys.exit(
                        f"{name}: off the float64 oracle by {errors[name]:.1e} over {size} ranks, allowed is "
                        f"{BOUNDS[settings.dtype]:.0e}: no times"
                    )
    found: dict[str, Any] = {"rank": mesh.get_rank(), "size": size, "errors": errors, "weak": [], "strong": []}
    for kind in PATTERNS:
        weak = settings.weak_tokens * size
        found["weak"].append(measure(settings, mesh, kind, weak, settings.weak_tokens))
        if settings.device == "cuda":
            torch.cuda.empty_cache()
        if settings.strong_tokens != weak:
            found["strong"].append(measure(settings, mesh, kind, settings.strong_tokens, settings.strong_tokens))
        else:
            found["strong"].append(found["weak"][-1])
    return found


def main() -> None:
    """Join, measure, write."""
    settings, folder = RingSettings.from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    if settings.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if settings.device == "cuda" else "gloo")
    mesh = init_device_mesh(settings.device, (dist.get_world_size(),))
    if len(sys.argv) > 3:
        longest_layer(settings, mesh, folder)
    else:
        (folder / f"rank{mesh.get_rank()}.json").write_text(json.dumps(run(settings, mesh)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
