"""A whole ring in one process: what every rank would compute, rank by rank, with rows handed over as tensors.

Shapes: B batch, N positions of the whole sequence, H query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.pattern import Pattern
from ...exchange.compute import Compute, RankProgram
from ...exchange.hops import HopProgram
from ...exchange.pieces import Merged, WholeRows, mergeable
from ...exchange.plan import plan_rank
from ...exchange.shards import Shards


def simulate(
    pattern: Pattern,
    shards: Shards,
    compute: Compute,
    inputs: Sequence[Tensor],
    *,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
    hops: bool = False,
) -> list[Tensor]:
    """Attention of a sequence that ranks share.

    Args:
        pattern: who sees whom.
        shards: the cut.
        compute: how pieces are computed; nothing of its own is sent anywhere.
        inputs: whole query (B, N, H, D), key and value (B, N, K, D), detached.
        dout: (B, N, H, D) gradient of out; None: no gradients.
        dlse: (B, H, N) gradient of lse, or None.
        hops: shards travel from rank to rank, instead of the rows that are named.

    Returns:
        out (B, N, H, D) and lse (B, H, N), and with `dout` the gradients of the inputs.

    Raises:
        ConfigError: a table of blocks that cannot be made.
    """
    query, key, value = ([part.contiguous() for part in x.chunk(shards.size, 1)] for x in inputs)
    ring = _Hops(pattern, shards, compute, key, value) if hops else _Rows(pattern, shards, compute, key, value)
    results = []
    for rank, q in enumerate(query):
        out, lse = ring.forward(rank, q)
        results.append((out.to(q.dtype).contiguous(), lse.contiguous()))
    found = [torch.cat(parts, dim) for parts, dim in zip(zip(*results, strict=True), (1, 2), strict=True)]
    if dout is None:
        return found
    douts = [part.contiguous() for part in dout.chunk(shards.size, 1)]
    dlses = [None] * shards.size if dlse is None else [part.contiguous() for part in dlse.chunk(shards.size, 2)]
    merged = [
        Merged(WholeRows(g, gl, q, *result), once)
        for g, gl, q, result, once in zip(douts, dlses, query, results, ring.once, strict=True)
    ]
    dk, dv = (torch.cat(parts, 1).to(inputs[1].dtype) for parts in zip(*ring.backward(merged), strict=True))
    return [*found, torch.cat([total.dq() for total in merged], 1), dk, dv]


class _Rows:
    """Each rank fetches the rows that its queries name."""

    def __init__(
        self, pattern: Pattern, shards: Shards, compute: Compute, key: list[Tensor], value: list[Tensor]
    ) -> None:
        ranks = range(shards.size)
        self.key, self.value = key, value
        self.programs = [RankProgram.prepare(plan_rank(pattern, shards, rank), compute) for rank in ranks]
        self.once = [program.once for program in self.programs]
        packed = [program.pack(k, v) for program, k, v in zip(self.programs, key, value, strict=True)]
        self.received = [torch.cat([packed[owner][to] for owner in ranks]) for to in ranks]

    def forward(self, rank: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse of a rank."""
        program = self.programs[rank]
        out, lse = program.local.forward(query, self.key[rank], self.value[rank])
        if program.stages:
            out, lse = mergeable(out, lse, once=program.once)
            program.merge_received(out, lse, query, self.received[rank])
        return out, lse

    def backward(self, merged: Sequence[Merged]) -> list[tuple[Tensor, Tensor]]:
        """dk and dv of every rank; adds to `merged`."""
        own = [
            program.local.backward(total, key, value)
            for program, total, key, value in zip(self.programs, merged, self.key, self.value, strict=True)
        ]
        beside = [Merged(total.rows, total.once) for total in merged]
        home = [
            program.received_backward(m, r) for program, m, r in zip(self.programs, beside, self.received, strict=True)
        ]
        for total, more in zip(merged, beside, strict=True):
            total.settle()
            total.add_sum(more)
        sums = [(dk.contiguous(), dv.contiguous()) for dk, dv in own]
        shares = [
            grads.split_with_sizes(program.plan.receive_counts.tolist())
            for program, grads in zip(self.programs, home, strict=True)
        ]
        for owner, program in enumerate(self.programs):
            program.unpack(*sums[owner], [share[owner] for share in shares])
        return sums


class _Hops:
    """Each rank meets every shard."""

    def __init__(
        self, pattern: Pattern, shards: Shards, compute: Compute, key: list[Tensor], value: list[Tensor]
    ) -> None:
        self.key, self.value = key, value
        ranks = range(shards.size)
        self.once = [False for _ in ranks]
        self.pieces = [HopProgram.prepare(pattern, shards, rank, compute, limit_bytes=None).pieces for rank in ranks]

    def forward(self, rank: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse of a rank."""
        out, lse = self.pieces[rank][rank].forward(query, self.key[rank], self.value[rank])
        for owner, piece in enumerate(self.pieces[rank]):
            if owner != rank and not piece.is_empty:
                out, lse = mergeable(out, lse)
                piece.merge_into(out, lse, query, self.key[owner], self.value[owner])
        return out, lse

    def backward(self, merged: Sequence[Merged]) -> list[tuple[Tensor, Tensor]]:
        """dk and dv of every rank; adds to `merged`."""
        dtype = merged[0].rows.dtype
        sums = [
            (torch.zeros(k.shape, dtype=dtype, device=k.device), torch.zeros(v.shape, dtype=dtype, device=v.device))
            for k, v in zip(self.key, self.value, strict=True)
        ]
        for pieces, rows in zip(self.pieces, merged, strict=True):
            for owner, piece in enumerate(pieces):
                if not piece.is_empty:
                    for total, grad in zip(
                        sums[owner], piece.backward(rows, self.key[owner], self.value[owner]), strict=True
                    ):
                        total.add_(grad)
        return sums
