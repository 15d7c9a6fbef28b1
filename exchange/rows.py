"""What a rank must know of all others to plan its own part. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from ..core.pattern import Pattern
from .census import branch_totals
from .plan import received_rows, rows_of
from .progressions import BranchRows
from .shards import Shards

if TYPE_CHECKING:
    from ..core.pattern import IntArray


@attrs.frozen(eq=False)
class Survey:
    """What a rank must know of all others to plan its own part.

    Attributes:
        most: the most rows that any rank receives in a forward pass.
        sent: of each rank, the own rows that it names (`RankPlan.sent`), where others' tables were lowered; else None.
    """

    most: int
    sent: tuple[IntArray, ...] | None


def most_rows(pattern: Pattern, shards: Shards) -> int:
    """A number of rows that no rank receives more of in a forward pass, found without looking at any rank."""
    everything = (shards.size - 1) * shards.length * shards.num_kv_heads
    branches = BranchRows.of(pattern, shards)
    return everything if branches is None else min(everything, branches.most)


def survey(pattern: Pattern, shards: Shards, rank: int, *, limit_bytes: int | None = None) -> Survey:
    """See `Survey`. Branches are counted; for blocks every rank's table is lowered, once.

    Raises:
        ConfigError: a table of blocks needs more than `limit_bytes`.
    """
    branches = BranchRows.of(pattern, shards)
    if branches is not None:
        return Survey(int(branch_totals(branches).received.max()), None)
    most, sent = 0, []
    for to in range(shards.size):
        codes = received_rows(pattern, shards, to, limit_bytes=limit_bytes)
        most = max(most, codes.size)
        sent.append(rows_of(codes, shards, rank))
    return Survey(most, tuple(sent))
