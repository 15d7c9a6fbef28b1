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


def can_be_by_hand(head_dim: int, dtype: torch.dtype, version: str) -> bool:
    """Whether the kernels of `hopper_kernels` have passed their tests for this, and with this Triton: Gluon changes."""
    return version.startswith("3.6.") and dtype != torch.float32 and 32 < head_dim <= 128


@attrs.frozen
class Tile:
    """Rows and columns of a tile, and how it is compiled.

    `registers` is the most that a thread may have; with `split` steps whose columns every row meets are told apart, and
    spared the mask. `by_hand` is for the kernels of `hopper_kernels`.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None
    split: bool = False
    by_hand: bool = False


@attrs.frozen
class Tiles:
    """The tiles of the passes."""

    forward: Tile
    queries: Tile
    keys: Tile

    @classmethod
    def alike(cls, tile: Tile) -> Tiles:
        """One tile for all passes."""
        return cls(tile, tile, tile)

    def of(self, which: str) -> Tile:
        """That of a pass."""
        found: Tile = getattr(self, which)
        return found


@attrs.frozen
class TileSizes:
    """The tiles over branches, and those over tables of blocks, which are cut to the block."""

    branches: Tiles
    blocks: Tiles

    @classmethod
    def of(cls, head_dim: int, dtype: torch.dtype, *, is_causal: bool, by_hand: bool = False) -> TileSizes:
        """What was fastest on an H100 (docs/performance.md), `by_hand` where `can_be_by_hand` says that it may be.

        More rows read keys less often, which is what bounds head_dim 64; at the diagonal they compute more in vain.
        """
        if dtype == torch.float32:
            small = Tiles.alike(Tile(32, 32, 4, 1) if head_dim > 64 else Tile(64, 32, 4, 1))
            return cls(small, small)
        if head_dim <= 64:
            forward = Tile(64, 64, 4, 3, 128) if is_causal else Tile(128, 64, 8, 3, 128)
            queries, keys = Tile(64, 32, 4, 4, 128), Tile(64, 32, 4, 3, 168)
            if by_hand:
                queries, keys = Tile(64, 64, 4, 3, 168, by_hand=True), Tile(64, 64, 4, 4, 255, by_hand=True)
            return cls(
                Tiles(forward, queries, keys),
                Tiles(Tile(128, 64, 8, 3, 128), Tile(128, 64, 8, 2, 128), Tile(64, 64, 4, 2, 168)),
            )
        if head_dim <= 128:
            forward = Tile(64, 32, 4, 3, 168) if is_causal else Tile(128, 32, 8, 3, 128, split=True)
            queries, keys = Tile(64, 32, 4, 3, split=True), Tile(64, 32, 4, 3, 255)
            if by_hand:
                queries, keys = Tile(128, 64, 8, 3, 255, by_hand=True), Tile(64, 32, 4, 4, 255, by_hand=True)
            return cls(
                Tiles(forward, queries, keys),
                Tiles(Tile(128, 64, 8, 2, 128), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2, 255)),
            )
        large = Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2))
        return cls(large, large)

    def within(self, block: int) -> Tiles:
        """For a table of blocks of that many positions, which rows and columns have to divide.

        Where a block is too small for a tile of blocks, that of branches is cut, which is compiled for fewer rows.
        """

        def cut(tile: Tile, other: Tile) -> Tile:
            chosen = tile if tile.rows <= block else other
            rows, columns = min(chosen.rows, block), min(chosen.columns, block)
            return attrs.evolve(chosen, rows=rows, columns=columns, by_hand=False)

        blocks, branches = self.blocks, self.branches
        return Tiles(
            cut(blocks.forward, branches.forward),
            cut(blocks.queries, branches.queries),
            cut(blocks.keys, branches.keys),
        )
