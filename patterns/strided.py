"""Strided attention: interleaved sequences, each dense."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

import attrs

from ..core.checks import an_int
from ..core.geometry import Geometry
from ..core.pattern import Branch, KeySpans, Pattern, parameters

if TYPE_CHECKING:
    from ..core.pattern import IntArray


_MOST: Final = 1 << 16  # each residue is a branch


@attrs.frozen
class Strided(Pattern):
    """Query p sees the keys at a distance that `stride` divides (the strided head of arXiv 1904.10509).

    Attributes:
        stride: distance in positions, at least 1 and at most 65,536; 1 is full attention.
    """

    kind: ClassVar[str] = "strided"
    keeps_prefixes: ClassVar[bool] = True
    heads_alike: ClassVar[bool] = True

    stride: int = attrs.field(validator=an_int(1, _MOST))

    def multiplicity(self, query: IntArray, key: IntArray, head: IntArray, geometry: Geometry) -> IntArray:
        """1 where the stride divides the distance."""
        import numpy as np

        shape = np.broadcast_shapes(query.shape, key.shape, head.shape)
        return np.broadcast_to((query - key) % self.stride == 0, shape).astype(np.int64)

    def branches(self, geometry: Geometry) -> tuple[Branch, ...]:
        """One branch per residue."""
        return tuple(Branch(None, self.stride, (offset,) * geometry.num_heads) for offset in range(self.stride))

    def key_spans(self, query_low: IntArray, query_high: IntArray, head: int, geometry: Geometry) -> KeySpans:
        """The block's own places shifted by every multiple of the stride; all keys where those touch each other."""
        import numpy as np

        first = geometry.kv_offset
        width = int((query_high - query_low).max(initial=0)) + 1
        if width >= self.stride:
            low = np.full((query_low.size, 1), first, dtype=np.int64)
            inner = geometry.kv_len if self.stride == 1 else 0
            return KeySpans(low, low + geometry.kv_len, low, low + inner)
        shifts = np.arange(-1, -(-geometry.kv_len // self.stride) + 1, dtype=np.int64) * self.stride
        low = (first + (query_low - first) % self.stride)[:, None] + shifts
        return KeySpans(low, low + (query_high - query_low + 1)[:, None], low, low)

    def block_signature(
        self, query_low: IntArray, key_low: IntArray, block_size: int, head: int, geometry: Geometry
    ) -> IntArray:
        """The distance of the corners modulo the stride."""
        return ((query_low - key_low) % self.stride)[:, None]

    def to_dict(self) -> dict[str, object]:
        """`{"kind": "strided", "stride": ...}`."""
        return parameters(self)
