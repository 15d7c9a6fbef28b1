"""The rows of strided branches that ranks name of each other: positions of one residue in one interval, head by head.

A branch names, before and after a shard, the positions of one residue in its segment's part there. Needs no torch.
R ranks, K key-value heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import attrs
import numpy as np

from ..core.lowering import layout_kinds, split
from ..core.pattern import Pattern
from .shards import Shards

if TYPE_CHECKING:
    from ..core.pattern import IntArray

Offsets = tuple[int | None, ...]  # of one head, branch by branch; None where it has no part in the branch


@attrs.frozen(order=True)
class Progression:
    """Positions of low:high that are congruent to `residue` modulo `stride`."""

    low: int
    high: int
    stride: int
    residue: int

    @property
    def first(self) -> int:
        """The smallest such position from `low` on."""
        return self.low + (self.residue - self.low) % self.stride

    def within(self, low: int, high: int) -> Progression:
        """Those of another interval too."""
        return Progression(max(low, self.low), min(high, self.high), self.stride, self.residue)

    @property
    def is_empty(self) -> bool:
        """No position at all."""
        return self.first >= self.high


class BranchRows:
    """The rows that ranks name by the branches of a pattern.

    Attributes:
        branches: those that it is lowered to, beside a table of blocks or without.
        heads: of each key-value head, the offsets of the query heads that read it, each once; none without branches.
    """

    def __init__(self, pattern: Pattern, shards: Shards) -> None:
        self.shards = shards
        self.branches, _ = split(pattern, shards.whole)
        group = shards.group_size
        offsets: list[Offsets] = list(zip(*(branch.offsets for branch in self.branches), strict=True))
        self.heads = [frozenset(offsets[head : head + group]) for head in range(0, shards.num_heads, group)]

    @classmethod
    def of(cls, pattern: Pattern, shards: Shards) -> BranchRows | None:
        """None where a part of the pattern is lowered to blocks."""
        kinds = layout_kinds(pattern, shards.whole)
        return cls(pattern, shards) if kinds == {"branch"} else None

    def progressions(self, rank: int, offsets: Offsets, low: int, high: int) -> Iterator[Progression]:
        """The keys at low:high, all before or all after the shard of `rank`, that its head with these offsets names."""
        length = self.shards.length
        q_low, q_high = rank * length, (rank + 1) * length
        for branch, offset in zip(self.branches, offsets, strict=True):
            if offset is None:
                continue
            width, base, end = branch.segment_length, 0, self.shards.seq_len
            if width is not None:  # the one segment that holds positions on both sides of the shard's edge
                base = (q_low if low < q_low else q_high - 1) // width * width
                end = base + width
            if base >= high or end <= low:
                continue
            whole = Progression(
                base + offset if width is not None else 0, end, branch.stride, (base + offset) % branch.stride
            )
            keys, queries = whole.within(low, high), whole.within(q_low, q_high)
            if not keys.is_empty and not queries.is_empty:
                yield keys

    @property
    def most(self) -> int:
        """Rows that no rank receives more of: of each branch a segment before its shard, and one after it."""
        total, seq_len = 0, self.shards.seq_len
        for kind in self.heads:
            for place, branch in enumerate(self.branches):
                width = seq_len if branch.segment_length is None else min(branch.segment_length, seq_len)
                residues = {offsets[place] for offsets in kind} - {None}
                total += len(residues) * -(-width // branch.stride)
        return total if self.shards.is_causal else 2 * total

    def named(self, rank: int, owner: int) -> IntArray:
        """The rows of `owner` that the queries of `rank` name, by head and place, counted over (place, head); int64."""
        length, num_heads = self.shards.length, self.shards.num_kv_heads
        low, high = owner * length, (owner + 1) * length
        places: dict[frozenset[Offsets], IntArray] = {}
        for kind in self.heads:
            if kind not in places:
                parts = {part for offsets in kind for part in self.progressions(rank, offsets, low, high)}
                places[kind] = _positions(sorted(parts)) - low
        rows: IntArray = np.concatenate([places[kind] * num_heads + head for head, kind in enumerate(self.heads)])
        return rows


def _positions(parts: Sequence[Progression]) -> IntArray:
    """All positions of `parts`, ascending, each once."""
    listed = [np.arange(part.first, part.high, part.stride, dtype=np.int64) for part in parts]
    if len(listed) == 1:
        return listed[0]
    return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *listed]))
