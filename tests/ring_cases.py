"""What ranks run for the tests of context parallelism; parent and ranks make the same inputs from the same seeds."""

from __future__ import annotations

from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dilated_attention import AttentionConfig, ContextParallel, build_attention, shard_sequence
from dilated_attention.core.attention import Attention
from dilated_attention.core.geometry import Geometry
from dilated_attention.exchange.engine import RingEngine

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
