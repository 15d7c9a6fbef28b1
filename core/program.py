"""What an engine keeps of each length that it has met."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import attrs
import numpy as np

from .checks import promises
from .counting import query_pairs
from .dynamic_tables import DynamicTables, dynamic_pairs
from .filled import MOST_ADDED
from .head_shard import HeadShard
from .layout import Layout
from .pattern import LearnedPattern, Pattern, Sum, Union

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .bands import Band
    from .documents import Packing
    from .kernel import BlockTable
    from .pattern import IntArray
    from .schedule import Schedule


def keeps_prefixes(pattern: Pattern) -> bool:
    """Whether the queries of causal attention see the same keys if more tokens follow."""
    named = pattern.unwrap()
    if isinstance(named, Union | Sum):
        return all(map(keeps_prefixes, named.of))
    if isinstance(named, HeadShard):
        return keeps_prefixes(named.of)
    return promises(named, "keeps_prefixes")


@attrs.frozen(eq=False)
class Program:
    """One lowered length, ready to run: the layout, its dense calls, and its blocks on their device.

    What the calls compute as `bands` is in no layout. Where blocks are chosen per call, `dynamic` has what is known of
    them before, and `bound` gives them. A batch row counts `pairs` over all query heads; with a `packing` it is all
    documents of a call that do.
    """

    layout: Layout
    schedule: Schedule
    blocks: BlockTable | None = None
    dynamic: DynamicTables | None = None
    packing: Packing | None = None  # documents, each of which is the beginning of what the layout says
    pairs_before: IntArray | None = None  # (q_len + 1,), of the layout's queries before each, where it has blocks
    bands: tuple[Band, ...] = ()
    prepared_bytes: int = 0  # that a kernel for whole layouts keeps with the layout
    pairs: int = attrs.field()

    @property
    def nbytes(self) -> int:
        """Memory of all of it."""
        parts = (self.layout, self.schedule, self.blocks, self.dynamic, self.pairs_before)
        return self.prepared_bytes + sum(part.nbytes for part in parts if part is not None)

    @pairs.default
    def _count_pairs(self) -> int:
        pattern = self.layout.pattern.unwrap()
        if isinstance(pattern, LearnedPattern):
            return dynamic_pairs(pattern, self.layout.geometry)
        if not self.schedule.calls:
            return self.layout.pairs
        return self.schedule.pairs + (0 if self.layout.blocks is None else self.layout.blocks.pairs)

    def counted(self, batch: int, lengths: Sequence[int] | None) -> tuple[int, int]:
        """Tokens and pairs of a call: of all of its batch rows, or of causal documents of these lengths.

        Documents are filled up to this length, each by at most `MOST_ADDED`.
        """
        q_len = self.layout.geometry.q_len
        if self.packing is not None:
            return self.packing.queries, self.pairs
        if lengths is None:
            return batch * q_len, batch * self.pairs
        return sum(lengths), sum(self._prefix_pairs[q_len - length] for length in lengths)

    @cached_property
    def _prefix_pairs(self) -> list[int]:
        """Pairs of all queries, of all but the last one, and so on; every layer asks for the same, in both passes."""
        per_query = query_pairs(self.layout, MOST_ADDED, self.bands)
        return [self.pairs, *(self.pairs - np.cumsum(per_query[::-1])).tolist()]

    def bound(self, tables: Tensor) -> Program:
        """The program over the blocks that `tables` names; a kernel for whole layouts gets them as they are."""
        return self if self.dynamic is None else attrs.evolve(self, blocks=self.dynamic.bind(tables))
