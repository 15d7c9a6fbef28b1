"""The mathematics of a sharded sequence in one process: every rank's plan computed in turn, against the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dilated_attention import Pattern
from dilated_attention.backends.aten import CpuFlash
from dilated_attention.core.composer import Composer
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import LayoutKernel
from dilated_attention.exchange.compute import Compute, Merged, RankProgram, mergeable
from dilated_attention.exchange.plan import plan_rank
from dilated_attention.exchange.shards import Shards

from .support import error, inputs, oracle


def simulate(
    pattern: Pattern,
    shards: Shards,
    tensors: Sequence[Tensor],
    *,
    through_lse: bool,
    kernel: LayoutKernel | None = None,
    takes_staged: bool = False,
) -> list[Tensor]:
    """out, lse, dq, dk, dv of the whole sequence, each rank computing its shard from its own rows and those it gets.

    Its own keys by `kernel`, where one is given.
    """
    dtype = tensors[0].dtype
    composer = Composer(CpuFlash(), 1 / math.sqrt(tensors[0].shape[3]), False)
    compute = Compute(composer, tensors[0].device, dtype, 1 << 20, kernel, takes_staged)
    ranks = range(shards.size)
    programs = [RankProgram.prepare(plan_rank(pattern, shards, rank), compute) for rank in ranks]
    q, k, v = ([part.detach().contiguous() for part in x.chunk(shards.size, 1)] for x in tensors)
    received = [torch.cat([programs[o].pack(k[o], v[o], to) for o in ranks]) for to in ranks]
    results = []
    for rank, program in enumerate(programs):
        out, lse = mergeable(*program.local.forward(q[rank], k[rank], v[rank]))
        program.merge_received(out, lse, q[rank], received[rank])
        results.append((out.to(dtype), lse.contiguous()))
    out, lse = (torch.cat(parts, dim) for parts, dim in zip(zip(*results, strict=True), (1, 2), strict=True))
    generator = torch.Generator().manual_seed(1)  # what `with_gradients` draws
    dout, drawn = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (out, lse))
    dlse = drawn if through_lse else None
    dq, dk, dv, home = [], [], [], []
    for rank, program in enumerate(programs):
        merged = Merged(
            dout.chunk(shards.size, 1)[rank],
            None if dlse is None else dlse.chunk(shards.size, 2)[rank].contiguous(),
            q[rank],
            *(results[rank][0], results[rank][1]),
        )
        home.append(program.received_backward(merged, received[rank]))
        own = program.local.backward(merged, k[rank], v[rank])
        dq.append(merged.dq())
        dk.append(own[0].contiguous())
        dv.append(own[1].contiguous())
    for rank, program in enumerate(programs):
        for owner, grads in enumerate(home[rank].split_with_sizes(program.plan.receive_counts.tolist())):
            programs[owner].unpack(dk[owner], dv[owner], grads, rank)
    return [out, lse, *(torch.cat(parts, 1) for parts in (dq, dk, dv))]


def worst(
    pattern: Pattern,
    shards: Shards,
    *,
    batch: int = 1,
    through_lse: bool = False,
    kernel: LayoutKernel | None = None,
    takes_staged: bool = False,
    dtype: torch.dtype = torch.float64,
    head_dim: int = 8,
    device: str = "cpu",
) -> float:
    """The largest error of `simulate` over out, lse, dq, dk, dv; on a card, of patterns that are no branches."""
    n, h, k = shards.seq_len, shards.num_heads, shards.num_kv_heads
    geometry = Geometry(q_len=n, kv_len=n, num_heads=h, num_kv_heads=k, is_causal=shards.is_causal)
    drawn = inputs(geometry, batch=batch, head_dim=head_dim, dtype=dtype)
    tensors = [x.detach().to(device).requires_grad_() for x in drawn]
    expected = oracle(pattern, tensors, geometry, through_lse=through_lse)
    actual = simulate(pattern, shards, tensors, through_lse=through_lse, kernel=kernel, takes_staged=takes_staged)
    return max(error(a, e) for a, e in zip(actual, expected, strict=True))
