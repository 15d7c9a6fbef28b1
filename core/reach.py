"""What later queries can see, and how often: which keys a cache for decoding has to keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import numpy as np

from .pattern import Pattern

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .config import AttentionConfig
    from .geometry import Geometry
    from .pattern import IntArray

_FAR = 1 << 40  # a position far behind every window and segment


class Reach:
    """What later queries can see, for one configuration.

    Attributes:
        keeps_all: no key is ever out of reach, as far as the pattern says.
    """

    def __init__(self, config: AttentionConfig, pattern: Pattern) -> None:
        self._pattern = pattern.unwrap()
        self._geometry = attrs.evolve(config.one_token, is_causal=True)
        self._groups = self._pattern.head_groups(config.num_heads, config.kv_heads)
        some = np.arange(_FAR // 2, _FAR // 2 + 1024, dtype=np.int64)
        self.keeps_all = all(bool(kept.all()) for kept in self.kept([some] * config.kv_heads, _FAR))

    def kept(self, positions: list[IntArray], length: int) -> list[NDArray[np.bool_]]:
        """For each key-value head, which of its positions a query at `length` or later may see, later ones included."""
        known: dict[tuple[int, int], NDArray[np.bool_]] = {}
        size, result = self._geometry.group_size, []
        for kv_head, own in enumerate(positions):
            before = own < length
            earlier, keep = own[before], ~before
            for head in range(kv_head * size, (kv_head + 1) * size):
                place = self._groups[head], id(own)
                if place not in known:
                    known[place] = self._pattern.reachable(earlier, length, head, self._geometry)
                keep[before] |= known[place]
            result.append(keep)
        return result

    def multiplicity(self, query: IntArray, key: IntArray, head: IntArray, geometry: Geometry) -> IntArray:
        """How often each query counts each key, causality included; keys before position 0 are none."""
        counts = self._pattern.multiplicity(query, np.maximum(key, 0), head, geometry)
        return counts * ((key >= 0) & (key <= query))

    def rows(self, length: int) -> list[int]:
        """How many keys each key-value head must keep once `length` tokens are known."""
        every = np.arange(length, dtype=np.int64)
        return [int(kept.sum()) for kept in self.kept([every] * self._geometry.num_kv_heads, length)]
