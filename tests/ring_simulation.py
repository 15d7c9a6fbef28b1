"""The mathematics of a sharded sequence in one process: every rank's plan computed in turn, against the oracle."""

from __future__ import annotations

import math

import torch

from dilated_attention import Pattern
from dilated_attention.backends.aten import CpuFlash
from dilated_attention.core.composer import Composer
from dilated_attention.core.geometry import Geometry
from dilated_attention.core.kernel import DenseKernel, LayoutKernel
from dilated_attention.exchange.compute import Compute
from dilated_attention.exchange.shards import Shards
from dilated_attention.registry.conformance.simulation import simulate

from .support import error, inputs, oracle


def worst(
    pattern: Pattern,
    shards: Shards,
    *,
    batch: int = 1,
    through_lse: bool = False,
    kernel: LayoutKernel | None = None,
    takes_staged: bool = False,
    dense: DenseKernel | None = None,
    dtype: torch.dtype = torch.float64,
    head_dim: int = 8,
    hops: bool = False,
    device: str = "cpu",
) -> float:
    """The largest error over out, lse, dq, dk, dv of ranks that compute their own keys by `kernel`, if one is given.

    Else, and what they receive, by `dense` or the kernel for CPUs.

    On a card, of patterns that are no branches.
    """
    n, h, k = shards.seq_len, shards.num_heads, shards.num_kv_heads
    geometry = Geometry(q_len=n, kv_len=n, num_heads=h, num_kv_heads=k, is_causal=shards.is_causal)
    drawn = inputs(geometry, batch=batch, head_dim=head_dim, dtype=dtype)
    tensors = [x.detach().to(device).requires_grad_() for x in drawn]
    expected = oracle(pattern, tensors, geometry, through_lse=through_lse)
    composer = Composer(dense or CpuFlash(), 1 / math.sqrt(head_dim), False)
    compute = Compute(composer, tensors[0].device, dtype, 1 << 20, kernel, takes_staged)
    generator = torch.Generator().manual_seed(1)  # what `with_gradients` draws
    dout = torch.randn((batch, n, h, head_dim), generator=generator, dtype=torch.float64).to(tensors[0])
    lse_dtype = torch.promote_types(dtype, torch.float32)
    drawn_lse = torch.randn((batch, h, n), generator=generator, dtype=torch.float64).to(device, lse_dtype)
    dlse = drawn_lse if through_lse else None
    whole = [x.detach() for x in tensors]
    actual = simulate(pattern, shards, compute, whole, dout=dout, dlse=dlse, hops=hops)
    return max(error(a, e) for a, e in zip(actual, expected, strict=True))
