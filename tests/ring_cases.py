"""What ranks run for the tests of context parallelism; parent and ranks make the same inputs from the same seeds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dilated_attention import (
    AttentionConfig,
    ConfigError,
    ContextParallel,
    Dilated,
    Local,
    Pattern,
    build_attention,
    local_positions,
    rebuild,
    shard_sequence,
    unshard_sequence,
)  # fmt: skip
from dilated_attention.core import reference
from dilated_attention.core.attention import Attention
from dilated_attention.core.geometry import Geometry
from dilated_attention.exchange.communicator import Pass
from dilated_attention.exchange.compute import RankProgram
from dilated_attention.exchange.engine import RingEngine
from dilated_attention.exchange.pieces import Merged

from .streams import Streams
from .support import inputs

_MESHES: dict[int, DeviceMesh] = {}


def mesh_of(size: int) -> DeviceMesh:
    """A mesh over the first ranks; made on all ranks alike."""
    if size not in _MESHES:
        _MESHES[size] = DeviceMesh("cpu", list(range(size)))
    return _MESHES[size]


def tensors_of(config: AttentionConfig, batch: int, seed: int = 0) -> list[Tensor]:
    """Whole query, key, value and the gradients of out and lse, in the config's dtype, the same everywhere."""
    assert config.seq_len is not None
    dtype: torch.dtype = getattr(torch, config.dtype)
    n, h = config.seq_len, config.num_heads
    geometry = Geometry(q_len=n, kv_len=n, num_heads=h, num_kv_heads=config.kv_heads, is_causal=config.is_causal)
    found = inputs(geometry, batch=batch, head_dim=config.head_dim, dtype=dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    dout = torch.randn((batch, n, h, config.head_dim), generator=generator, dtype=torch.float64).to(dtype)
    dlse = torch.randn((batch, h, n), generator=generator, dtype=torch.float64)
    return [x.detach() for x in found] + [dout, dlse.to(torch.float64 if dtype == torch.float64 else torch.float32)]


def ring_engine(attention: Attention) -> RingEngine:
    """The engine of an attention over a ring."""
    engine = attention._engine
    assert isinstance(engine, RingEngine)
    return engine


def run_shard(
    attention: Attention, mesh: DeviceMesh, whole: list[Tensor], *, through_lse: bool = False
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv of this rank's shard."""
    size = attention.config.ring_size
    q, k, v, dout = (shard_sequence(x, mesh, size=size) for x in whole[:4])
    dlse = shard_sequence(whole[4], mesh, dim=2, size=size)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, return_lse=True)
    outputs, grads = ([out, lse], [dout, dlse]) if through_lse else ([out], [dout])
    return (out.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, grads))


def counters_of(attention: Attention) -> dict[str, Any]:
    """What the ring, which attentions share, has moved by now."""
    return attrs.asdict(ring_engine(attention).communicator.counters) if attention.config.ring_size > 1 else {}


def exact(fields: dict[str, Any], size: int, batch: int, through_lse: bool, seed: int = 0) -> Any:
    """The five results of a shard as numpy arrays, and the counters; None on ranks outside the mesh."""
    mesh = mesh_of(size)
    if dist.get_rank() >= size:
        return None
    parallel = fields.pop("context_parallel", ContextParallel(size=size))
    config = AttentionConfig(**fields, context_parallel=parallel)
    attention = build_attention(config, mesh=mesh)
    before = counters_of(attention)
    results = run_shard(attention, mesh, tensors_of(config, batch, seed), through_lse=through_lse)
    counters = {name: value - before[name] for name, value in counters_of(attention).items()}
    return [x.float().numpy() if x.dtype == torch.bfloat16 else x.numpy() for x in results], counters


def watched(fields: dict[str, Any], size: int) -> Any:
    """One forward and backward pass: the attention's own counters, and our ranges in the trace of another one."""
    mesh = mesh_of(size)
    if dist.get_rank() >= size:
        return None
    config = AttentionConfig(**fields, context_parallel=ContextParallel(size=size))
    attention = build_attention(config, mesh=mesh)
    whole = tensors_of(config, 1)
    run_shard(attention, mesh, whole)
    counters = attention.counters()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
        run_shard(attention, mesh, whole)
    words = ("dilated_attention ", "ring ", "own keys", "received keys", "keys of")
    return counters, {event.key for event in trace.key_averages() if event.key.startswith(words)}


def ordered(fields: dict[str, Any], size: int, launches_first: bool) -> Any:
    """What happens in which order in a forward and a backward pass, and the results."""
    mesh = mesh_of(size)
    config = AttentionConfig(**fields, context_parallel=ContextParallel(size=size))
    attention = build_attention(config, mesh=mesh)
    engine, whole, seen = ring_engine(attention), tensors_of(config, 1), list[str]()
    run_shard(attention, mesh, whole)
    assert config.seq_len is not None
    program = engine.rings.get((config.seq_len // size, False, torch.device("cpu")))
    assert program is not None
    assert program.selective is not None
    marks = 0

    def told(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def telling(*rest: Any, **named: Any) -> Any:
            seen.append(name)
            return call(*rest, **named)

        return telling

    def mark() -> object:
        nonlocal marks
        marks += 1
        seen.append(f"mark {marks}")
        return marks

    def aside(after: object = None) -> AbstractContextManager[None]:
        seen.append("aside" if after is None else f"aside after {after}")
        return nullcontext()

    communicator, transport = engine.communicator, engine.communicator.transport
    with ExitStack() as stack:

        def watch(owner: Any, name: str, label: str) -> None:
            stack.enter_context(mock.patch.object(owner, name, told(label, getattr(owner, name))))

        stack.enter_context(mock.patch.object(transport, "launches_first", launches_first))
        stack.enter_context(mock.patch.object(transport, "mark", mark))
        stack.enter_context(mock.patch.object(transport, "aside", aside))
        watch(communicator._control, "announce", "announce")
        watch(communicator._control, "agree", "agree")
        watch(transport, "rejoin", "rejoin")
        watch(transport, "post", "post")
        watch(Pass, "wait", "wait")
        watch(RankProgram, "pack", "pack")
        watch(RankProgram, "unpack", "unpack")
        watch(RankProgram, "merge_received", "received keys")
        watch(RankProgram, "received_backward", "received keys")
        watch(Merged, "add_sum", "sum")
        watch(type(program.selective.local), "forward", "own keys")
        watch(type(program.selective.local), "backward", "own keys")
        results = run_shard(attention, mesh, whole)
    return seen, [x.numpy() for x in results]


def streamed(fields: dict[str, Any], size: int, through_lse: bool) -> Any:
    """What two passes in a row do out of order, were they computed on two streams, and the results of the second."""
    mesh = mesh_of(size)
    config = AttentionConfig(**fields, context_parallel=ContextParallel(size=size))
    attention = build_attention(config, mesh=mesh)
    transport, whole, streams = ring_engine(attention).communicator.transport, tensors_of(config, 2), Streams()
    results = run_shard(attention, mesh, whole, through_lse=through_lse)  # tables are made before
    with ExitStack() as stack:
        for name in ("mark", "aside", "rejoin"):
            stack.enter_context(mock.patch.object(transport, name, getattr(streams, name)))
        stack.enter_context(mock.patch.object(transport, "launches_first", True))
        stack.enter_context(streams)
        for _ in range(2):
            results = run_shard(attention, mesh, whole, through_lse=through_lse)
        results = tuple(x.clone() for x in results)  # as whoever called does, on the main stream
    return streams.found, [x.float().numpy() for x in results]


def refusals() -> dict[str, Any]:
    """What the functions around a mesh give and refuse."""
    mesh = mesh_of(4)
    said: dict[str, Any] = {"positions": local_positions(12, mesh).tolist()}
    x = torch.arange(24.0).view(1, 12, 2)
    said["whole"] = torch.equal(unshard_sequence(shard_sequence(x, mesh), mesh), x)
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    parallel = {size: ContextParallel(size=size) for size in (2, 3, 4)}
    attention = build_attention(num_heads=2, head_dim=8, context_parallel=parallel[4], mesh=mesh)
    q = torch.randn(1, 3, 2, 8)
    leaf = q.clone().requires_grad_()
    part, rank = torch.zeros(1, 3, 2), mesh.get_local_rank()
    said["last"] = torch.equal(unshard_sequence(shard_sequence(x.mT, mesh, -1), mesh, -1), x.mT)
    pair = DeviceMesh("cpu", [0, 1])
    attempts: dict[str, Any] = {
        "dim": lambda: shard_sequence(x, mesh, 3),
        "list": lambda: shard_sequence([1], mesh),  # type: ignore[arg-type]  # what callers must not do
        "array": lambda: unshard_sequence(x.numpy(), mesh),  # type: ignore[arg-type]
        "minus": lambda: unshard_sequence(part, mesh, -4),
        "uneven": lambda: unshard_sequence(part[:, : 3 - rank // 3], mesh),
        "dtypes": lambda: unshard_sequence(part.double() if rank == 1 else part, mesh),
        "outside": lambda: shard_sequence(x, pair),
        "length": lambda: shard_sequence(torch.zeros(1, 10), mesh),
        "size": lambda: build_attention(num_heads=2, head_dim=8, context_parallel=parallel[3], mesh=mesh),
        "dims": lambda: build_attention(num_heads=2, head_dim=8, context_parallel=parallel[2], mesh=square),
        "gradient": lambda: unshard_sequence(torch.zeros(1, 3, requires_grad=True), mesh),
        "offsets": lambda: attention(q, q, q, q_offset=3),
        "alone": lambda: ring_engine(attention).forward(q, q, q, 0, 0, None, None),
        "func": lambda: torch.func.grad(lambda x: attention(x, q, q).sum())(q),
        "batched": lambda: torch.autograd.grad(
            attention(leaf, q, q), leaf, q.expand(2, *q.shape), is_grads_batched=True
        ),
        "padding": lambda: attention(q, q, q, key_padding_mask=torch.tensor([[False, False, True]])),
        "packing": lambda: attention(q, q, q, cu_seqlens=torch.tensor([0, 1, 3])),
        "received": lambda: attention.received(q, q, torch.zeros(1, 2, 3)),
        "cache": lambda: build_attention(
            num_heads=2, head_dim=8, is_causal=True, context_parallel=parallel[4], mesh=mesh
        ).make_cache(1),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except ConfigError as error:
            said[name] = str(error)
    return said


def behaviour() -> dict[str, Any]:
    """State, sharing, checkpointing, one dimension of a larger mesh, and the caller's groups."""
    fields: dict[str, Any] = {"num_heads": 2, "head_dim": 8, "is_causal": True, "pattern": Dilated((8, 48), (1, 4))}
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    mesh = square["cp"]
    first, second = (build_attention(fields, context_parallel=ContextParallel(size=2), mesh=mesh) for _ in range(2))
    whole = tensors_of(AttentionConfig(**fields, seq_len=48), 1)
    plain = run_shard(first, mesh, whole)
    leaves = [shard_sequence(x, mesh).requires_grad_() for x in whole[:3]]
    again = checkpoint(first, *leaves, use_reentrant=False)
    grads = torch.autograd.grad(again, leaves, shard_sequence(whole[3], mesh))
    selective = _selectively(mesh, whole)
    alone = build_attention(fields)
    expected = shard_sequence(alone(*whole[:3]), mesh)
    ring = ring_engine(first).communicator
    first.prepare(48)
    programs = len(ring_engine(first).rings)
    second.prepare(96)
    ring.close()  # the caller's groups go on
    total = torch.ones(1)
    dist.all_reduce(total, group=mesh.get_group())
    return {
        "state_dict": list(first.state_dict()),
        "shared": ring_engine(first).communicator is ring_engine(second).communicator and programs == 1,
        "checkpoint_equal": all(torch.equal(a, b) for a, b in zip(grads, plain[2:], strict=True)),
        "selective_equal": selective,
        "submesh": float((plain[0] - expected).abs().max()),
        "groups_kept": total.item() == 2 and dist.is_initialized(),
        "prepared": [program.shards.length for program in ring_engine(first).rings._values.values()],
    }


def _selectively(mesh: DeviceMesh, whole: list[Tensor]) -> bool:
    """Whether selective checkpointing that keeps every operator's result gives the gradients of plain calls."""
    pattern = Dilated((8, 48), (1, 4)) | Local(3)
    fields: dict[str, Any] = {"num_heads": 2, "head_dim": 8, "is_causal": True, "pattern": pattern}
    attention = build_attention(fields, context_parallel=ContextParallel(size=2), mesh=mesh)
    leaves = [shard_sequence(x, mesh).requires_grad_() for x in whole[:3]]
    dout = shard_sequence(whole[3], mesh)
    contexts = partial(create_selective_checkpoint_contexts, lambda *_, **__: True)
    expected = torch.autograd.grad(attention(*leaves), leaves, dout)
    out = checkpoint(attention, *leaves, use_reentrant=False, context_fn=contexts)
    found = torch.autograd.grad(out, leaves, dout)
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def regrown() -> dict[str, Any]:
    """An attention of one rank rebuilt over four and as one again: errors of the shard."""
    fields: dict[str, Any] = {"num_heads": 2, "head_dim": 8, "is_causal": True, "dtype": "float64"}
    mesh, pattern = mesh_of(4), Dilated((8, 48), (1, 4)) + Local(5)
    attention = build_attention(fields, pattern=pattern, backend="reference", context_parallel=ContextParallel(size=1))
    whole = tensors_of(AttentionConfig(**fields, seq_len=48), 1)[:3]
    expected, _ = reference.attention(*whole, pattern=pattern, is_causal=True)
    rebuild(attention, mesh=mesh, generation=1)
    plan = attention.plan.exchange
    assert plan is not None
    found = attention(*(shard_sequence(x, mesh) for x in whole))
    error = float((found - shard_sequence(expected, mesh)).abs().max())
    said = ""
    try:
        attention.received(found, found, torch.zeros(1, 2, 12, dtype=found.dtype))
    except ConfigError as refusal:
        said = str(refusal)
    rebuild(attention, mesh=None, generation=2)
    alone = float((attention(*whole) - expected).abs().max())
    return {"companion": (plan.companion, plan.companion_kernel), "ring": error, "alone": alone, "received": said}


def perturbed(pattern: Pattern, seq_len: int, position: int) -> list[tuple[int, int]]:
    """The (position, head) of this rank's rows that move when one key and value change."""
    mesh = mesh_of(4)
    fields: dict[str, Any] = {"num_heads": 2, "head_dim": 8, "is_causal": True, "pattern": pattern}
    attention = build_attention(fields, context_parallel=ContextParallel(size=4), mesh=mesh)
    q, k, v, *_ = tensors_of(AttentionConfig(**fields, seq_len=seq_len), 1)
    before = attention(*(shard_sequence(x, mesh) for x in (q, k, v)))
    k[:, position] += 1
    v[:, position] -= 1
    after = attention(*(shard_sequence(x, mesh) for x in (q, k, v)))
    rows, heads = torch.nonzero((before != after).any(-1)[0], as_tuple=True)
    first = int(local_positions(seq_len, mesh)[0])
    return [(first + int(row), int(head)) for row, head in zip(rows, heads, strict=True)]
