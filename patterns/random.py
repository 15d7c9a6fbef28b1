"""Random attention: per head and row of blocks, a few key blocks drawn uniformly."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Final

import attrs

from ..core.checks import MOST_IN_BLOCK, MOST_POSITIONS, an_int, keep_number, keep_plain, require_int
from ..core.errors import ConfigError
from ..core.geometry import Geometry
from ..core.pattern import Pattern, parameters

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..core.layout import BlockGrid, BlockSupport
    from ..core.pattern import IntArray

_MOST_BLOCKS: Final = (1 << 31) - 1  # their numbers are int32


def _density(instance: Random, attribute: attrs.Attribute[float | None], value: object) -> None:
    if value is None:
        return
    number = keep_number(instance, attribute, value)
    if number is None or not 0 < number <= 1:
        raise ConfigError(f"Random.density must be a number above 0 and at most 1, got {value!r}")


def _seed(instance: Random, attribute: attrs.Attribute[int], value: object) -> None:
    seed = require_int("Random.seed", value, minimum=0)
    if seed >= 1 << 64:
        raise ConfigError(f"Random.seed must be below 2**64, got {seed}")
    keep_plain(instance, attribute, seed)


@lru_cache
def _share(density: str) -> Fraction:
    """The number that is written so."""
    return Fraction(density)


@attrs.frozen
class Random(Pattern):
    """Each head and row of query blocks sees its own block and others drawn uniformly (BigBird, arXiv 2007.14062).

    Blocks are those of absolute positions: position p lies in block p // block_size. A row draws from the blocks of the
    sequence, or up to its own where attention is causal; a causal row's draw depends on (seed, head, row) alone, so it
    stays what it is while the sequence grows. The same on every machine.

    Attributes:
        blocks_per_row: distinct key blocks a row sees, its own included; all that exist where those are fewer.
        block_size: positions in a block.
        seed: at least 0 and below 2**64; another seed, another draw.
        density: instead of blocks_per_row, the fraction of the blocks to choose from that a row sees, rounded up; read
            as the decimal number that it is written as.

    Raises:
        ConfigError: not exactly one of blocks_per_row and density, or a value out of its range. So does a call with
            positions beyond 2**31 blocks.
    """

    kind: ClassVar[str] = "random"
    keeps_prefixes: ClassVar[bool] = True

    blocks_per_row: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(an_int(1, MOST_POSITIONS))
    )
    block_size: int = attrs.field(default=128, validator=an_int(1, MOST_IN_BLOCK))
    seed: int = attrs.field(default=0, validator=_seed)
    density: float | None = attrs.field(default=None, kw_only=True, validator=_density)

    def __attrs_post_init__(self) -> None:
        if (self.blocks_per_row is None) == (self.density is None):
            raise ConfigError(
                f"Random takes either blocks_per_row or density, got blocks_per_row={self.blocks_per_row} and "
                f"density={self.density}"
            )

    def _allowed(self, rows: IntArray, geometry: Geometry) -> tuple[IntArray, IntArray]:
        """Blocks that each row may choose from, and how many of them it takes; 1 of 1 for rows before position 0."""
        import numpy as np

        total = 0 if geometry.is_causal else -(-geometry.seq_len // self.block_size)
        allowed = np.where(rows < 0, 1, np.maximum(rows + 1, total))
        if self.blocks_per_row is not None:
            return allowed, np.minimum(allowed, self.blocks_per_row)
        share = _share(str(self.density))
        if max(share.numerator * int(allowed.max(initial=0)), share.denominator) < 1 << 63:
            return allowed, -(-share.numerator * allowed // share.denominator)
        distinct, inverse = np.unique(allowed, return_inverse=True)
        take = [-(-share.numerator * int(n) // share.denominator) for n in distinct]
        return allowed, np.array(take, dtype=np.int64)[inverse]

    def _draw(
        self, heads: IntArray, rows: IntArray, choice: tuple[IntArray, IntArray]
    ) -> tuple[IntArray, NDArray[np.int32]]:
        """The drawn columns of each (head, row): row_ptr (n + 1,) and cols, ascending; `choice` is of `_allowed`."""
        import numpy as np

        from ._reservoir import draw_rows

        allowed, take = choice
        if rows.size and max(int(allowed.max()), -int(rows.min())) > _MOST_BLOCKS:
            raise ConfigError(
                f"Random draws among blocks up to number {_MOST_BLOCKS:,}, got positions beyond "
                f"{_MOST_BLOCKS * self.block_size:,} in blocks of {self.block_size}; take a larger block_size, or "
                "smaller offsets"
            )
        row_ptr = np.zeros(rows.size + 1, dtype=np.int64)
        np.cumsum(take, out=row_ptr[1:])
        cols = np.empty(int(row_ptr[-1]), dtype=np.int32)
        before = rows < 0
        if rows.size:
            draw_rows(np.uint64(self.seed), heads, np.where(before, 0, rows), allowed, row_ptr, cols)
        cols[row_ptr[:-1][before]] = rows[before]
        return row_ptr, cols

    def _holds(self, rows: IntArray, cols: IntArray, head: int, geometry: Geometry) -> NDArray[np.bool_]:
        """Whether each row's draw contains each column, (n,)."""
        import numpy as np

        distinct, inverse = np.unique(rows, return_inverse=True)
        row_ptr, drawn = self._draw(np.full_like(distinct, head), distinct, self._allowed(distinct, geometry))
        least = min(int(cols.min()), int(drawn.min()))
        width = max(int(cols.max()), int(drawn.max())) - least + 1
        listed = np.repeat(np.arange(distinct.size), np.diff(row_ptr)) * width + (drawn - least)
        wanted = inverse * width + (cols - least)
        place = np.minimum(np.searchsorted(listed, wanted), listed.size - 1)
        found: NDArray[np.bool_] = listed[place] == wanted
        return found

    def multiplicity(self, query: IntArray, key: IntArray, head: IntArray, geometry: Geometry) -> IntArray:
        """1 where the key's block is among those drawn for the query's."""
        import numpy as np

        rows, heads = np.broadcast_arrays(query // self.block_size, head)
        cols = key // self.block_size
        pairs, inverse = np.unique(np.stack([heads.ravel(), rows.ravel()]), axis=1, return_inverse=True)
        if not pairs.size or not cols.size:
            return np.zeros(np.broadcast_shapes(rows.shape, cols.shape), dtype=np.int64)
        row_ptr, drawn = self._draw(pairs[0].copy(), pairs[1].copy(), self._allowed(pairs[1], geometry))
        least = int(cols.min())
        table = np.zeros((pairs.shape[1], int(cols.max()) - least + 1), dtype=np.int64)
        inside = (drawn >= least) & (drawn < least + table.shape[1])
        table[np.repeat(np.arange(pairs.shape[1]), np.diff(row_ptr))[inside], drawn[inside] - least] = 1
        return table[inverse.reshape(rows.shape), cols - least]

    def block_support(self, grid: BlockGrid, head: int, geometry: Geometry) -> BlockSupport:
        """The drawn blocks, constant; on another grid every block that overlaps one, constant where it lies inside."""
        import numpy as np

        from ..core.supports import support_from_table

        low, high = grid.query_low, np.minimum(grid.query_low + grid.block_size, geometry.q_offset + geometry.q_len) - 1
        if low.size:
            rows = np.arange(low[0] // self.block_size, high[-1] // self.block_size + 1, dtype=np.int64)
        else:
            rows = low
        choice = self._allowed(rows, geometry)
        if grid.block_size <= self.block_size:
            # Of all heads at once where none of it can lie outside of the keys: each takes seconds at great lengths.
            whole = geometry.kv_offset <= 0 and geometry.kv_offset + geometry.kv_len >= geometry.seq_len
            tables = grid.tables if whole else 1
            grid.check_blocks(tables * int(choice[1].sum()))
        row_ptr, drawn = self._draw(np.full_like(rows, head), rows, choice)
        cols = drawn.astype(np.int64)
        return support_from_table(grid, geometry, self.block_size, rows, row_ptr, cols, np.ones_like(cols))

    def block_signature(
        self, query_low: IntArray, key_low: IntArray, block_size: int, head: int, geometry: Geometry
    ) -> IntArray:
        """Which of the at most four own blocks that a block touches are drawn, and where their edges cut it."""
        from ..core.supports import corner_signature

        def drawn(rows: IntArray, cols: IntArray) -> IntArray:
            return self._holds(rows, cols, head, geometry).astype(rows.dtype)

        return corner_signature(query_low, key_low, block_size, self.block_size, drawn)

    def to_dict(self) -> dict[str, object]:
        """The fields that are given, with `kind`."""
        return {name: value for name, value in parameters(self).items() if value is not None}
