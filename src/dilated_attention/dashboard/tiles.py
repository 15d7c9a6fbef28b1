"""A pattern as a picture of cells of one size, its tiles.

Shapes: T tiles on each side. A tile is a whole number of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import attrs
import numpy as np

from ..core.blocking import DEFAULT_BLOCK_SIZE
from ..core.errors import ConfigError
from ..core.geometry import Geometry
from ..core.pattern import LearnedPattern, Pattern
from ..pattern_cells import Cells, count_cells

TILES: Final = 64
# A tile darkens at these shares of its pairs; whatever is seen at all shows.
STEPS: Final = (0.01, 0.05, 0.25, 0.75)
_TABLE_BYTES: Final = 128 << 20
_LARGEST_BLOCK: Final = 512


@attrs.frozen
class TileRow:
    """A row of tiles: its queries, the span of the keys they see, and in how many tiles, how many pairs, what share."""

    queries: str
    keys: str
    tiles: int
    seen: int
    share: float


@attrs.frozen(kw_only=True, eq=False)
class Picture(Cells):
    """Tiles, (T, T), and what they are of.

    Attributes:
        name: for people.
        length: tokens.
        head: whose.
        num_heads: of how many.
        is_causal: whether later keys are hidden.
        tile: tokens on a tile's side; the last tile may be shorter.
    """

    name: str
    length: int
    head: int
    num_heads: int
    is_causal: bool
    tile: int

    def bounds(self, index: int) -> tuple[int, int]:
        """First and last position of a tile's row or column."""
        return index * self.tile, min(self.length, (index + 1) * self.tile) - 1

    def path(self, level: int) -> str:
        """All tiles of a level as the path of an SVG in which a tile is one unit wide; runs in a row are joined."""
        parts = []
        for row, line in enumerate(self.levels(STEPS) == level):
            edges = np.flatnonzero(np.diff(line.astype(np.int8), prepend=0, append=0))
            parts += [f"M{a} {row}h{b - a}v1h{a - b}z" for a, b in edges.reshape(-1, 2).tolist()]
        return "".join(parts)

    def rows(self) -> Iterator[TileRow]:
        """The picture as a table, a line a row of tiles."""
        for index, (seen, allowed) in enumerate(zip(self.seen, self.allowed, strict=True)):
            found = np.flatnonzero(seen).tolist()
            low, high = self.bounds(index)
            keys = f"{self.bounds(found[0])[0]:,} to {self.bounds(found[-1])[1]:,}" if found else "none"
            pairs, possible = int(seen.sum()), int(allowed.sum())
            yield TileRow(f"{low:,} to {high:,}", keys, len(found), pairs, pairs / possible)

    def to_dict(self) -> dict[str, Any]:
        """What the page's script needs to say which tile is under the pointer."""
        return {
            "tile": self.tile,
            "length": self.length,
            "seen": self.seen.ravel().tolist(),
            "allowed": self.allowed.ravel().tolist(),
        }


def picture(name: str, pattern: Pattern, *, length: int, num_heads: int, is_causal: bool, head: int = 0) -> Picture:
    """The picture of one head.

    Raises:
        ConfigError: a learned pattern, which is another at every call, or tables of more than 128 MiB.
    """
    if isinstance(pattern.unwrap(), LearnedPattern):
        raise ConfigError(
            f"a {pattern.kind} pattern chooses its blocks at every call, so there is no picture of it; store what "
            "attention.gate.freeze(query, key) returns and name that"
        )
    geometry = Geometry.self_attention(length, num_heads, is_causal=is_causal)
    tile, block = _sizes(pattern.block_size, length)
    starts = np.arange(0, length, tile, dtype=np.int64)
    cells = count_cells(pattern, geometry, head, rows=starts, cols=starts, block_size=block, limit_bytes=_TABLE_BYTES)
    return Picture(
        name=name,
        length=length,
        head=head,
        num_heads=num_heads,
        is_causal=is_causal,
        tile=tile,
        seen=cells.seen,
        allowed=cells.allowed,
    )


def _sizes(own: int | None, length: int) -> tuple[int, int]:
    """Tokens on the side of a tile and of a block, which divides it; `own` is the pattern's own block."""
    unit = own or (DEFAULT_BLOCK_SIZE if length > DEFAULT_BLOCK_SIZE * TILES else 1)
    tile = unit * -(-length // (unit * TILES))
    if own is not None or tile <= _LARGEST_BLOCK:
        return tile, own or tile
    return tile, _LARGEST_BLOCK if tile % _LARGEST_BLOCK == 0 else DEFAULT_BLOCK_SIZE
