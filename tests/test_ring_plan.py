"""The mathematics of a sharded sequence without processes: every rank's plan computed in turn, against the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilated_attention import ConfigError, Dilated, Full, Global, Local, Pattern, Random, Strided
from dilated_attention.backends.aten import CpuFlash
from dilated_attention.core import reference
from dilated_attention.core.composer import Composer
from dilated_attention.core.geometry import Geometry
from dilated_attention.exchange.compute import Compute, Merged, RankProgram
from dilated_attention.exchange.plan import plan_rank, row_codes
from dilated_attention.exchange.shards import Shards, shard_length

from .strategies import patterns
from .support import error, inputs, oracle

HEAD_DIM = 8


def simulate(pattern: Pattern, shards: Shards, tensors: Sequence[Tensor], *, through_lse: bool) -> list[Tensor]:
    """out, lse, dq, dk, dv of the whole sequence, each rank computing its shard from its own rows and those it gets."""
    dtype = tensors[0].dtype
    composer = Composer(CpuFlash(), 1 / math.sqrt(HEAD_DIM), False)
    compute = Compute(composer, torch.device("cpu"), dtype, 1 << 20)
    ranks = range(shards.size)
    programs = [RankProgram.prepare(plan_rank(pattern, shards, rank), compute) for rank in ranks]
    q, k, v = ([part.detach().contiguous() for part in x.chunk(shards.size, 1)] for x in tensors)
    received = [torch.cat([programs[o].pack(k[o], v[o], to) for o in ranks]) for to in ranks]
    results = []
    for rank, program in enumerate(programs):
        out, lse = program.local.forward(q[rank], k[rank], v[rank])
        program.merge_received(out, lse, q[rank], received[rank])
        results.append((out.to(dtype), lse))
    out, lse = (torch.cat(parts, dim) for parts, dim in zip(zip(*results, strict=True), (1, 2), strict=True))
    generator = torch.Generator().manual_seed(1)  # what `with_gradients` draws
    dout = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype)
    dlse = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(lse.dtype) if through_lse else None
    dq, dk, dv, home = [], [], [], []
    for rank, program in enumerate(programs):
        merged = Merged.of(
            dout.chunk(shards.size, 1)[rank],
            None if dlse is None else dlse.chunk(shards.size, 2)[rank],
            q[rank],
            *(results[rank][0], results[rank][1]),
        )
        home.append(program.received_backward(merged, received[rank]))
        own = program.local.backward(merged, k[rank], v[rank])
        dq.append(merged.dq[..., :HEAD_DIM])
        dk.append(own[0].contiguous())
        dv.append(own[1].contiguous())
    for rank, program in enumerate(programs):
        for owner, grads in enumerate(home[rank].split_with_sizes(program.plan.receive_counts.tolist())):
            programs[owner].unpack(dk[owner], dv[owner], grads, rank)
    return [out, lse, *(torch.cat(parts, 1) for parts in (dq, dk, dv))]


def worst(pattern: Pattern, shards: Shards, *, batch: int = 1, through_lse: bool = False) -> float:
    """The largest error over out, lse, dq, dk, dv in float64."""
    n, h, k = shards.seq_len, shards.num_heads, shards.num_kv_heads
    geometry = Geometry(q_len=n, kv_len=n, num_heads=h, num_kv_heads=k, is_causal=shards.is_causal)
    tensors = inputs(geometry, batch=batch, head_dim=HEAD_DIM, dtype=torch.float64)
    expected = oracle(pattern, tensors, geometry, through_lse=through_lse)
    actual = simulate(pattern, shards, tensors, through_lse=through_lse)
    return max(error(a, e) for a, e in zip(actual, expected, strict=True))


LONGNET = Dilated((8, 16, 32, 96), (1, 2, 4, 8))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(
    "pattern",
    [
        Full(),
        LONGNET,
        Dilated((7, 19, 50), (1, 3, 5)),
        Dilated((8, 96), (1, 6), heads="split"),
        Dilated((16, 64), (2, 4), offsets="blocked", offsets_by="kv_head"),
        Strided(5),
        Local(9) | Global(3),
        Random(2, 8),
        Random(2, 7) + LONGNET,
        Dilated((24,), (2,)) | Local(20),
    ],
    ids=repr,
)
def test_every_rank_computes_its_shard_exactly(pattern: Pattern, is_causal: bool) -> None:
    for size in (1, 2, 3, 4):
        for batch, kv_heads in ((1, 4), (2, 2)):
            shards = Shards(96 // size, size, 4, kv_heads, is_causal)
            assert worst(pattern, shards, batch=batch, through_lse=batch == 2) < 1e-12


@given(pattern=patterns(), size=st.integers(1, 5), length=st.integers(1, 14), is_causal=st.booleans())
@settings(max_examples=30, deadline=None)
def test_any_pattern_any_cut(pattern: Pattern, size: int, length: int, is_causal: bool) -> None:
    assert worst(pattern, Shards(length, size, 4, 2, is_causal)) < 1e-12


def named(pattern: Pattern, shards: Shards, rank: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Codes of the rows of other ranks that the queries of `rank` count, from the dense multiplicity."""
    n, h = shards.seq_len, shards.num_heads
    geometry = Geometry(q_len=n, kv_len=n, num_heads=h, num_kv_heads=shards.num_kv_heads, is_causal=shards.is_causal)
    counts = reference.multiplicity(pattern, geometry)[:, rank * shards.length : (rank + 1) * shards.length]
    seen = counts.sum(1).view(shards.num_kv_heads, shards.group_size, n).sum(1) > 0
    seen[:, rank * shards.length : (rank + 1) * shards.length] = False
    head, position = np.nonzero(seen.numpy())
    return np.sort(row_codes(head, position, shards))


@given(length=st.integers(1, 20), size=st.integers(1, 5), is_causal=st.booleans(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_dilated_patterns_move_each_named_row_once_and_no_other(
    length: int, size: int, is_causal: bool, data: st.DataObject
) -> None:
    from .strategies import dilated

    pattern = data.draw(st.one_of(dilated(), st.builds(Strided, st.integers(1, 9)), st.just(Full())))
    shards = Shards(length, size, 4, 2, is_causal)
    plans = [plan_rank(pattern, shards, rank) for rank in range(size)]
    for rank, plan in enumerate(plans):
        assert np.array_equal(plan.received, named(pattern, shards, rank))
        for owner in range(size):
            assert plans[owner].sent[rank].size == plan.receive_counts[owner]


def test_a_length_that_cannot_be_cut_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"1,000 tokens cannot be cut into 3 equal shards.*999 and 1,002"):
        shard_length(1000, 3)
    assert shard_length(999, 3) == 333
