"""How large the tiles of the fused kernels are, and how they are compiled."""

from __future__ import annotations

import attrs
import torch


@attrs.frozen
class Tile:
    """Rows and columns of a tile, and how it is compiled.

    `registers` is the most that a thread may have; without `split` columns that every row meets take the masked loop
    too, which costs a little more work and fewer registers.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None
    split: bool = True


@attrs.frozen
class Tiles:
    """The tiles of the three kernels."""

    forward: Tile
    queries: Tile
    keys: Tile

    @classmethod
    def of(cls, head_dim: int, dtype: torch.dtype) -> Tiles:
        """What was fastest on an H100 (docs/performance.md)."""
        if dtype == torch.float32:
            small = Tile(32, 32, 4, 1) if head_dim > 64 else Tile(64, 32, 4, 1)
            return cls(small, small, small)
        if head_dim <= 64:
            return cls(Tile(64, 64, 4, 3, 128), Tile(64, 32, 4, 4, 128), Tile(64, 32, 4, 3, 168, split=False))
        if head_dim <= 128:
            return cls(Tile(64, 32, 4, 3, 168), Tile(64, 32, 4, 3), Tile(64, 64, 4, 2, 255, split=False))
        return cls(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2))

    def within(self, block: int) -> Tiles:
        """The same where rows and columns have to divide a block of positions."""
        return Tiles(*(attrs.evolve(t, rows=min(t.rows, block), columns=min(t.columns, block)) for t in self._all()))

    def _all(self) -> tuple[Tile, Tile, Tile]:
        return self.forward, self.queries, self.keys
