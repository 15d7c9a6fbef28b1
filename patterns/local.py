"""Local attention: a sliding window around each query."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from ..core.bands import Band
from ..core.checks import MOST_POSITIONS, plain_int, require_int
from ..core.errors import ConfigError
from ..core.geometry import Geometry
from ..core.pattern import KeySpans, Pattern, parameters
from ..core.repeats import Repeats

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..core.pattern import IntArray


def _both_sides(value: int | Sequence[int]) -> tuple[object, ...]:
    """An integer stands for both sides; two integers are (left, right)."""
    is_one = isinstance(value, str) or not (isinstance(value, Sequence) or getattr(value, "ndim", 0) == 1)
    given: Any = (value, value) if is_one else value
    sides = tuple(map(plain_int, given))
    if len(sides) != 2:
        raise ConfigError(f"Local.window_size must be an integer or (left, right), got {value!r}")
    return sides


def _sides(instance: Local, attribute: attrs.Attribute[tuple[int, int]], value: tuple[object, ...]) -> None:
    for side, size in zip(("left", "right"), value, strict=True):
        if isinstance(size, int) and not 0 <= size <= MOST_POSITIONS:
            bound = "at least 0" if size < 0 else f"at most {MOST_POSITIONS:,}"
            raise ConfigError(
                f"Local.window_size ({side}) must be {bound}, got {size:,}; unbounded attention is Full()"
            )
        require_int(f"Local.window_size ({side})", size, minimum=0)


@attrs.frozen
class Local(Pattern):
    """Query p sees the keys p - left ... p + right, both included (flash-attn's `window_size`).

    Attributes:
        window_size: (left, right) in positions; a single integer is both. At least 0; 0 is the position itself.

    Raises:
        ConfigError: a side that is negative, beyond 2**40 or no integer.
    """

    kind: ClassVar[str] = "local"
    keeps_prefixes: ClassVar[bool] = True
    heads_alike: ClassVar[bool] = True

    window_size: tuple[int, int] = attrs.field(converter=_both_sides, validator=_sides)

    @classmethod
    def from_sliding_window(cls, sliding_window: int) -> Local:
        """A causal window of `sliding_window` keys, the query's own included, as Hugging Face counts it."""
        return cls((require_int("sliding_window", sliding_window, minimum=1) - 1, 0))

    def multiplicity(self, query: IntArray, key: IntArray, head: IntArray, geometry: Geometry) -> IntArray:
        """1 inside the window."""
        import numpy as np

        left, right = self.window_size
        inside = (key >= query - left) & (key <= query + right)
        shape = np.broadcast_shapes(query.shape, key.shape, head.shape)
        return np.broadcast_to(inside, shape).astype(np.int64)

    def bands(self) -> tuple[Band, ...]:
        """One."""
        return (Band(*self.window_size),)

    def key_spans(self, query_low: IntArray, query_high: IntArray, head: int, geometry: Geometry) -> KeySpans:
        """The windows of the first and the last query: their hull, and what both see."""
        from ..core.supports import single_span

        left, right = self.window_size
        return single_span(query_low - left, query_high + right + 1, query_high - left, query_low + right + 1)

    def reachable(self, key: IntArray, position: int, head: int, geometry: Geometry) -> NDArray[np.bool_]:
        """The keys in the window of the next query."""
        return key >= position - self.window_size[0]

    def block_signature(
        self, query_low: IntArray, key_low: IntArray, block_size: int, head: int, geometry: Geometry
    ) -> IntArray:
        """The distance of the corners, as far as the window's edges can tell it."""
        import numpy as np

        left, right = self.window_size
        distance: IntArray = np.clip(query_low - key_low, -right - block_size, left + block_size)
        return distance[:, None]

    def repeats(self) -> Repeats:
        """The window moves with its query."""
        left, right = self.window_size
        return Repeats(fixed=0, start=0, period=1, left=left, right=right)

    def to_dict(self) -> dict[str, object]:
        """`{"kind": "local", "window_size": [left, right]}`."""
        return parameters(self)
