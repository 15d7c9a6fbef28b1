"""What an engine keeps of each length that it has met."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np

from .counting import branch_pairs, query_pairs
from .dynamic_tables import DynamicTables, dynamic_pairs
from .geometry import Geometry
from .layout import Layout
from .pattern import LearnedPattern, Pattern, Sum, Union

if TYPE_CHECKING:
    from torch import Tensor

    from .block_product import BlockProduct
    from .pattern import IntArray
    from .schedule import Schedule


def keeps_prefixes(pattern: Pattern) -> bool:
    """Whether the queries of causal attention see the same keys if more tokens follow."""
    named = pattern.unwrap()
    return all(map(keeps_prefixes, named.of)) if isinstance(named, Union | Sum) else named.keeps_prefixes


@attrs.frozen(eq=False)
class Program:
    """One lowered length, ready to run: the layout, its dense calls, and its blocks on their device.

    Where blocks are chosen per call, `dynamic` has what is known of them before, and `bound` gives them. A batch row
    counts `pairs` over all query heads.
    """

    layout: Layout
    schedule: Schedule
    blocks: BlockProduct | None = None
    dynamic: DynamicTables | None = None
    prepared_bytes: int = 0  # that a kernel for whole layouts keeps with the layout
    pairs: int = attrs.field()
    _of_prefixes: list[IntArray] = attrs.field(factory=list, init=False)

    @property
    def nbytes(self) -> int:
        """Memory of all of it."""
        parts = (self.layout, self.schedule, self.blocks, self.dynamic)
        return self.prepared_bytes + sum(part.nbytes for part in parts if part is not None)

    @pairs.default
    def _count_pairs(self) -> int:
        pattern = self.layout.pattern.unwrap()
        if isinstance(pattern, LearnedPattern):
            return dynamic_pairs(pattern, self.layout.geometry)
        if not self.schedule.calls:
            return self.layout.pairs
        return self.schedule.pairs + (0 if self.layout.blocks is None else self.layout.blocks.pairs)

    def prefix_pairs(self, length: int) -> int:
        """What the first `length` queries count of as many keys, of a causal pattern that keeps prefixes."""
        geometry = self.layout.geometry
        short = Geometry.self_attention(length, geometry.num_heads, is_causal=True)
        pairs = sum(branch_pairs(branch, short) for branch in self.layout.branches)
        if self.layout.blocks is not None:
            if not self._of_prefixes:
                self._of_prefixes.append(np.cumsum(query_pairs(self.layout.blocks)))
            pairs += int(self._of_prefixes[0][length - 1])
        return pairs

    def bound(self, tables: Tensor) -> Program:
        """The program over the blocks that `tables` names; a kernel for whole layouts gets them as they are."""
        return self if self.dynamic is None else attrs.evolve(self, blocks=self.dynamic.bind(tables))
