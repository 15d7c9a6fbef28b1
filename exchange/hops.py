"""The ring of old: whole shards of keys and values travel from rank to rank, each meeting every rank's queries.

Used where some rank would name more rows than `Limits.exchange_buffer_bytes` holds: memory is two shards in flight,
whatever the length. In step t a rank holds the shard of rank - t (mod R) while the next one is already arriving; in the
backward the shard's gradient follows one hop behind and is home after R hops. What causality makes useless travels on
all the same, since others need it. Shapes: B batch, S positions of a shard, K key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from ..core.lowering import lower
from ..core.tracing import span
from .communicator import HOPS, HOPS_BACK
from .compute import Compute
from .pieces import mergeable

if TYPE_CHECKING:
    from ..core.pattern import Pattern
    from .communicator import Communicator, Pass
    from .pieces import Merged, Piece
    from .shards import Shards

    Begin = Callable[[int, Tensor], AbstractContextManager[Pass]]  # a pass of a kind, for a shard


@attrs.frozen(eq=False)
class HopProgram:
    """The queries of one rank against each rank's keys, by owner."""

    pieces: tuple[Piece, ...]

    @property
    def pairs(self) -> int:
        """Pairs that a batch row of the rank counts."""
        return sum(piece.pairs for piece in self.pieces)

    @classmethod
    def prepare(
        cls, pattern: Pattern, shards: Shards, rank: int, compute: Compute, *, limit_bytes: int | None
    ) -> HopProgram:
        """Lower the pattern against every shard; raises `ConfigError` beyond `limit_bytes`."""
        geometries = (shards.against(rank, owner) for owner in range(shards.size))
        return cls(tuple(compute.shard(lower(pattern, g, limit_bytes=limit_bytes)) for g in geometries))

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        return sum(piece.nbytes for piece in self.pieces)


def hop_forward(
    communicator: Communicator,
    program: HopProgram,
    begin: Begin,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor, int]:
    """out and lse of the shard, and the pass's number; collective."""
    rank, size = communicator.rank, communicator.size
    held = torch.stack([key, value])
    with begin(HOPS, query) as current:
        spare = torch.empty_like(held)
        for step in range(size):
            pending = None
            if step < size - 1:
                pending = current.post([((rank + 1) % size, held)], [((rank - 1) % size, spare)])
            owner = (rank - step) % size
            piece = program.pieces[owner]
            with span(f"keys of rank {owner}"):
                if step == 0:
                    out, lse = piece.forward(query, key, value)
                elif not piece.is_empty:
                    out, lse = mergeable(out, lse)
                    piece.merge_into(out, lse, query, held[0], held[1])
            if pending is not None:
                current.wait(pending)
                held, spare = spare, held
    return out, lse, current.number


def hop_backward(
    communicator: Communicator,
    program: HopProgram,
    begin: Begin,
    merged: Merged,
    key: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor]:
    """dk and dv of the shard, in the accumulator's dtype; adds to `merged`; collective."""
    rank, size = communicator.rank, communicator.size
    after, before = (rank + 1) % size, (rank - 1) % size
    held = torch.stack([key, value])
    grads: Tensor | None = None
    with begin(HOPS_BACK, key) as current:
        spare = torch.empty_like(held)
        arriving = torch.empty(held.shape, dtype=merged.rows.dtype, device=key.device)
        for step in range(size):
            pending = None
            if step < size - 1:
                pending = current.post([(after, held)], [(before, spare)])
            owner = (rank - step) % size
            piece = program.pieces[owner]
            with span(f"keys of rank {owner}"):
                own = None
                if not piece.is_empty:
                    own = torch.stack(piece.backward(merged, held[0], held[1])).to(merged.rows.dtype)
            if pending is not None:
                current.wait(pending)
                held, spare = spare, held
            if grads is not None:  # what the shard of this step has gathered on its way, from the rank before
                current.wait(current.post([(after, grads)], [(before, arriving)]))
                grads, arriving = arriving, grads
                own = grads if own is None else grads.add_(own)
            grads = torch.zeros_like(arriving) if own is None else own
        assert grads is not None
        current.wait(current.post([(after, grads)], [(before, arriving)]))
    return arriving[0], arriving[1]
