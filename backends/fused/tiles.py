"""How large the tiles of the fused kernels are, and how they are compiled."""

from __future__ import annotations

import attrs
import torch


def ceil_div(a: int, b: int) -> int:
    """How many b cover a; Triton's own function costs a launch microseconds."""
    return -(-a // b)


def padded(head_dim: int) -> int:
    """The power of two that a kernel computes with for a head_dim."""
    return 1 << (head_dim - 1).bit_length()


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
    """The tiles of the three kernels, and of the forward pass over blocks that are large enough for it."""

    forward: Tile
    queries: Tile
    keys: Tile
    blocks: Tile

    @classmethod
    def of(cls, head_dim: int, dtype: torch.dtype) -> Tiles:
        """What was fastest on an H100 (docs/performance.md)."""
        if dtype == torch.float32:
            small = Tile(32, 32, 4, 1) if head_dim > 64 else Tile(64, 32, 4, 1)
            return cls(small, small, small, small)
        if head_dim <= 64:
            return cls(
                Tile(64, 64, 4, 3, 128),
                Tile(64, 32, 4, 4, 128),
                Tile(64, 32, 4, 3, 168, split=False),
                Tile(128, 64, 8, 3, 128),
            )
        if head_dim <= 128:
            return cls(
                Tile(64, 32, 4, 3, 168), Tile(64, 32, 4, 3), Tile(64, 64, 4, 2, 255, split=False), Tile(64, 64, 4, 3)
            )
        return cls(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(64, 32, 4, 2))

    def within(self, block: int) -> Tiles:
        """For a table of blocks of that many positions, which rows and columns have to divide."""
        forward = self.blocks if self.blocks.rows <= block else self.forward
        cut = (
            attrs.evolve(tile, rows=min(tile.rows, block), columns=min(tile.columns, block))
            for tile in (forward, self.queries, self.keys, forward)
        )
        return Tiles(*cut)
