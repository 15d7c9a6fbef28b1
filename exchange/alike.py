"""What tables of blocks add to what every rank receives, sends and computes: once for ranks that are alike.

Where a pattern repeats itself along the sequence (`Pattern.repeats`), ranks at whole periods from each other name the
same fixed keys, and others at the same distances; the first of them is counted for all. Ranks near an end of the
sequence, and all ranks of other patterns, are alike to none. R ranks, n of them.
"""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING

import attrs
import numpy as np

from ..core.lowering import table_block_size
from ..core.pattern import Pattern
from .owners import Owners
from .progressions import BranchRows
from .shards import Shards
from .tables import lowered

if TYPE_CHECKING:
    from ..core.pattern import IntArray


@attrs.frozen(eq=False)
class BlockTotals:
    """Rows that each rank receives and sends in a forward pass, and pairs that it counts; (R,) int64."""

    received: IntArray
    sent: IntArray
    pairs: IntArray


@attrs.frozen(eq=False)
class _Kinds:
    """Ranks by what they name.

    Attributes:
        alone: those that are alike to none, ascending, (n,) int64.
        alike: others, those that are alike together, ascending, (n,) int64 each.
        fixed: the position that the fixed keys of `alike` end before.
    """

    alone: IntArray
    alike: list[IntArray]
    fixed: int = 0


def block_totals(pattern: Pattern, branches: BranchRows, *, limit_bytes: int | None = None) -> BlockTotals:
    """What the pattern's tables of blocks add to its branches, for all ranks.

    Raises:
        ConfigError: a table of blocks needs more than `limit_bytes`.
    """
    shards = branches.shards
    owners, kinds = Owners(shards.length, shards.size), _kinds(pattern, shards)
    received, pairs = (np.zeros(shards.size, dtype=np.int64) for _ in range(2))
    for table in lowered(pattern, shards, kinds.alone, limit_bytes=limit_bytes):
        table.add_pairs(pairs)
        for rows in table.rows_beyond(branches):
            rows.add_to(received)
            rows.add_within(owners, 0, shards.seq_len)
    for some in kinds.alike:
        moving = Owners(shards.length, shards.size)
        for table in lowered(pattern, shards, some[:1], limit_bytes=limit_bytes):
            table.add_pairs(pairs)
            for rows in table.rows_beyond(branches):
                rows.add_to(received)
                rows.add_within(owners, 0, kinds.fixed, some.size)
                rows.add_within(moving, kinds.fixed, shards.seq_len)
        received[some], pairs[some] = received[some[0]], pairs[some[0]]
        owners.add_moved(moving.rows, some - some[0])
    return BlockTotals(received, owners.rows, pairs)


def _kinds(pattern: Pattern, shards: Shards) -> _Kinds:
    begin = np.arange(shards.size, dtype=np.int64) * shards.length
    repeats = pattern.unwrap().repeats()
    if repeats is None:
        return _Kinds(np.arange(shards.size), [])
    size = table_block_size(pattern, shards.whole)
    fixed = -(-repeats.fixed // size) * size
    # Blocks of fixed keys and others are told apart, and the last block of the sequence is as long as any.
    inside = (begin >= repeats.start) & ((begin - repeats.left) // size * size >= fixed)
    if not shards.is_causal:
        inside &= begin + shards.length + repeats.right + size <= shards.seq_len
    ranks = np.flatnonzero(inside)
    _, kind = np.unique(begin[ranks] % lcm(repeats.period, size), return_inverse=True)
    order = np.argsort(kind, kind="stable")
    found = np.split(ranks[order], np.cumsum(np.bincount(kind))[:-1])
    alone = [np.flatnonzero(~inside), *(some for some in found if some.size == 1)]
    return _Kinds(np.sort(np.concatenate(alone)), [some for some in found if some.size > 1], fixed)
