"""Global attention: the first tokens see everything and are seen by everything."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

from ..core.bands import ANYWHERE, Band
from ..core.checks import MOST_POSITIONS, an_int
from ..core.geometry import Geometry
from ..core.pattern import KeySpans, Pattern, parameters
from ..core.repeats import Repeats

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..core.pattern import IntArray


@attrs.frozen
class Global(Pattern):
    """Positions 0 ... tokens - 1 see all positions and are seen by all (Longformer, arXiv 2004.05150).

    Attributes:
        tokens: how many of the sequence's first positions are global, at least 1.
    """

    kind: ClassVar[str] = "global"
    keeps_prefixes: ClassVar[bool] = True
    heads_alike: ClassVar[bool] = True

    tokens: int = attrs.field(validator=an_int(1, MOST_POSITIONS))

    def multiplicity(self, query: IntArray, key: IntArray, head: IntArray, geometry: Geometry) -> IntArray:
        """1 where either position is global."""
        import numpy as np

        query_is, key_is = (query >= 0) & (query < self.tokens), (key >= 0) & (key < self.tokens)
        shape = np.broadcast_shapes(query.shape, key.shape, head.shape)
        return np.broadcast_to(query_is | key_is, shape).astype(np.int64)

    def bands(self) -> tuple[Band, ...]:
        """Global queries with all keys, and the queries on either side of them with global keys."""
        tokens = (0, self.tokens)
        others = (-ANYWHERE, 0), (self.tokens, ANYWHERE)
        return Band(queries=tokens), *(Band(queries=side, keys=tokens) for side in others)

    def key_spans(self, query_low: IntArray, query_high: IntArray, head: int, geometry: Geometry) -> KeySpans:
        """All keys for blocks with a global query, the global keys for the others."""
        import numpy as np

        from ..core.supports import single_span

        some = (query_low < self.tokens) & (query_high >= 0)
        every = (query_low >= 0) & (query_high < self.tokens)
        first, last = geometry.kv_offset, geometry.kv_offset + geometry.kv_len
        low, high = np.where(some, first, 0), np.where(some, last, self.tokens)
        inner_low, inner_high = np.where(every, first, 0), np.where(every, last, self.tokens)
        return single_span(low, high, inner_low, inner_high)

    def reachable(self, key: IntArray, position: int, head: int, geometry: Geometry) -> NDArray[np.bool_]:
        """The global keys; all keys while a global query is still to come."""
        return key < (self.tokens if position >= self.tokens else position)

    def block_signature(
        self, query_low: IntArray, key_low: IntArray, block_size: int, head: int, geometry: Geometry
    ) -> IntArray:
        """Per side: -1 for a block without global positions, -2 for one of nothing else, its corner for a mixed one."""
        import numpy as np

        def code(low: IntArray) -> IntArray:
            outside = (low >= self.tokens) | (low <= -block_size)
            inside = (low >= 0) & (low + block_size <= self.tokens)
            return np.where(outside, -1, np.where(inside, -2, low + block_size))

        return np.stack([code(query_low), code(key_low)], axis=-1)

    def repeats(self) -> Repeats:
        """Beyond the global tokens a query sees these alone."""
        return Repeats(fixed=self.tokens, start=self.tokens, period=1, left=0, right=0)

    def to_dict(self) -> dict[str, object]:
        """`{"kind": "global", "tokens": ...}`."""
        return parameters(self)
