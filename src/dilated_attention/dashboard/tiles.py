"""A pattern as a picture of tiles, each with the exact number of its pairs that a head sees.

Shapes: T tiles on each side. A tile is a whole number of blocks, so no block counts for two tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import attrs
import numpy as np
from numpy.typing import NDArray

from ..core.blocking import DEFAULT_BLOCK_SIZE, lower_blocks
from ..core.errors import ConfigError
from ..core.geometry import Geometry
from ..core.pattern import LearnedPattern, Pattern

Counts = NDArray[np.int64]

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
class Picture:
    """What one head sees of one sequence.

    Attributes:
        name: for people.
        length: tokens.
        head: whose.
        num_heads: of how many.
        is_causal: whether later keys are hidden.
        tile: tokens on a tile's side; the last tile may be shorter.
        seen: (T, T) int64, pairs of queries (rows) and keys that count at least once.
        allowed: (T, T) int64, pairs that causality allows.
    """

    name: str
    length: int
    head: int
    num_heads: int
    is_causal: bool
    tile: int
    seen: Counts
    allowed: Counts

    @property
    def density(self) -> float:
        """Pairs seen as a share of those allowed."""
        return float(self.seen.sum() / self.allowed.sum())

    def bounds(self, index: int) -> tuple[int, int]:
        """First and last position of a tile's row or column."""
        return index * self.tile, min(self.length, (index + 1) * self.tile) - 1

    def levels(self) -> Counts:
        """(T, T) int64: -1 where causality allows nothing, 0 for not seen, 1 to 5 for darker and darker."""
        shares = self.seen / np.maximum(self.allowed, 1)
        levels = np.where(self.seen > 0, 1 + np.searchsorted(STEPS, shares), 0)
        return np.where(self.allowed > 0, levels, -1)

    def path(self, level: int) -> str:
        """All tiles of a level as the path of an SVG in which a tile is one unit wide; runs in a row are joined."""
        parts = []
        for row, line in enumerate(self.levels() == level):
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
    table = lower_blocks(pattern, geometry, block_size=block, limit_bytes=_TABLE_BYTES)
    count = -(-length // tile)
    own = int(table.head_table[head])
    pointers = table.row_ptr[own]
    entries = slice(int(pointers[0]), int(pointers[-1]))
    rows = np.repeat(np.arange(pointers.size - 1), np.diff(pointers))
    cols, mask_ids = table.cols[entries].astype(np.int64), table.mask_ids[entries]
    pairs = np.minimum(length - rows * block, block) * block  # a block at the end of the keys has a mask
    if table.masks.size:
        pairs = np.where(mask_ids >= 0, np.count_nonzero(table.masks, axis=(1, 2))[mask_ids], pairs)
    place = (rows * block // tile) * count + cols * block // tile
    seen = np.bincount(place, weights=pairs, minlength=count * count).astype(np.int64).reshape(count, count)
    return Picture(
        name=name,
        length=length,
        head=head,
        num_heads=num_heads,
        is_causal=is_causal,
        tile=tile,
        seen=seen,
        allowed=_allowed(length, tile, count, is_causal=is_causal),
    )


def _sizes(own: int | None, length: int) -> tuple[int, int]:
    """Tokens on the side of a tile and of a block, which divides it; `own` is the pattern's own block."""
    unit = own or (DEFAULT_BLOCK_SIZE if length > DEFAULT_BLOCK_SIZE * TILES else 1)
    tile = unit * -(-length // (unit * TILES))
    if own is not None or tile <= _LARGEST_BLOCK:
        return tile, own or tile
    return tile, _LARGEST_BLOCK if tile % _LARGEST_BLOCK == 0 else DEFAULT_BLOCK_SIZE


def _allowed(length: int, tile: int, count: int, *, is_causal: bool) -> Counts:
    """(T, T): pairs of each tile that causality allows."""
    sizes = np.minimum(length - np.arange(count, dtype=np.int64) * tile, tile)
    pairs = sizes[:, None] * sizes
    if not is_causal:
        return pairs
    triangle: Counts = np.tril(pairs, -1) + np.diag(sizes * (sizes + 1) // 2)
    return triangle
