"""How large the tiles of the fused kernels are, and how they are compiled."""

from __future__ import annotations

from typing import Final, Literal

import attrs
import torch

from ..cards import GLUON_RELEASES, PROVEN, ROOMY_KIB, is_among, shared_kib

Pass = Literal["forward", "queries", "keys", "gradients"]
PASSES: Final[tuple[Pass, ...]] = ("forward", "queries", "keys", "gradients")

WIDEST_FLOAT32: Final = 128  # head_dim whose tiles of float32 fit with less
_FEWEST: Final = 24  # registers that warps can give the others but for


def ceil_div(a: int, b: int) -> int:
    """How many b cover a; Triton's own function costs a launch microseconds."""
    return -(-a // b)


def padded(head_dim: int) -> int:
    """The power of two that a kernel computes with for a head_dim."""
    return 1 << (head_dim - 1).bit_length()


def can_be_fed(head_dim: int, dtype: torch.dtype, version: str) -> bool:
    """Whether there are kernels for Hopper for this, which serve this release of Triton."""
    return is_among(version, GLUON_RELEASES) and dtype != torch.float32 and 32 < head_dim <= 256


@attrs.frozen
class Tile:
    """Rows and columns of a tile, and how it is compiled.

    `registers` is the most that a thread may have; with `split` steps whose columns every row meets are told apart, and
    spared the mask. With `parts` it is for the kernels with a ring that feeds them (see `hopper_ring`); one that `adds`
    is for those among them with four more warps, which add (see `hopper_joint_kernels`), one that is `apart` for
    gradients of keys whose dk and dv are of different warps.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None
    split: bool = False
    parts: int = 0
    adds: bool = False
    apart: bool = False

    @classmethod
    def by_ring(
        cls, columns: int, stages: int, registers: int, *, parts: int = 2, split: bool = False, adds: bool = False
    ) -> Tile:
        """One that is fed, of 64 rows a part."""
        return cls(64 * parts, columns, 4, stages, registers, split, parts, adds)

    @classmethod
    def by_ring_apart(cls, columns: int, stages: int, registers: int) -> Tile:
        """Likewise of 64 rows, of which dk and dv have a part each."""
        return cls(64, columns, 4, stages, registers, parts=1, apart=True)

    def span(self, head_dim: int) -> int:
        """The columns that rows are computed with: with a ring three quarters of a power of two may do."""
        whole = padded(head_dim)
        return whole * 3 // 4 if self.parts and head_dim <= whole * 3 // 4 else whole

    @property
    def _computing(self) -> int:
        """Fours of warps that compute rows."""
        return self.parts + self.apart

    @property
    def begin(self) -> int:
        """Registers that each thread of one that is fed begins with: one or two programs fill a multiprocessor.

        The warps that feed then leave the others what `feeding` does not keep.
        """
        if self._computing == 1 or self.adds:
            return 128
        return 80 if (self.registers or 0) <= 104 else 168

    @property
    def feeding(self) -> int:
        """Registers that a thread which feeds keeps."""
        if self.adds:
            return _FEWEST
        return (self._computing + 1) * self.begin - self._computing * (self.registers or 0)

    @property
    def adding(self) -> int:
        """Registers that a thread which adds keeps."""
        return (self.parts + 2) * self.begin - self.parts * (self.registers or 0) - _FEWEST


@attrs.frozen
class Tiles:
    """The tiles of the passes; `gradients` is that of queries and keys in one launch, where there is such a kernel."""

    forward: Tile
    queries: Tile
    keys: Tile
    gradients: Tile | None = None

    @classmethod
    def alike(cls, tile: Tile) -> Tiles:
        """One tile for all passes."""
        return cls(tile, tile, tile)

    def of(self, which: Pass) -> Tile:
        """That of a pass of theirs."""
        found: Tile = getattr(self, which)
        return found

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Those that have a tile."""
        return PASSES if self.gradients else PASSES[:-1]


@attrs.frozen
class TileSizes:
    """The tiles over branches, and those over tables of blocks.

    `few` is compiled for fewer rows, and cut to blocks that those of `blocks` are too large for. Where those are fed,
    blocks that they do not divide have the tiles of `unfed`.
    """

    branches: Tiles
    blocks: Tiles
    few: Tiles
    unfed: TileSizes | None = None

    @classmethod
    def of(cls, head_dim: int, dtype: torch.dtype, *, is_causal: bool, fed: bool = False) -> TileSizes:
        """What was fastest on an H100 or H200 (docs/performance_log.md), `fed` where `can_be_fed` says that it may be.

        More rows read keys less often, which is what bounds head_dim 64; at the diagonal they compute more in vain.
        """
        if dtype == torch.float32:
            return cls.alike(Tiles.alike(Tile(32, 32, 4, 1) if head_dim > 64 else Tile(64, 32, 4, 1)))
        if fed:
            return cls._fed(head_dim, cls.of(head_dim, dtype, is_causal=is_causal), is_causal=is_causal)
        if head_dim <= 64:
            few = Tiles(Tile(64, 64, 4, 3, 128), Tile(64, 32, 4, 4, 128), Tile(64, 32, 4, 3, 168))
            forward = Tile(128, 64, 8, 3, 128)
            blocks = Tiles(forward, Tile(128, 64, 8, 2, 128), Tile(64, 64, 4, 2, 168))
        elif head_dim <= 128:
            few = Tiles(Tile(64, 32, 4, 3, 168), Tile(64, 32, 4, 3, split=True), Tile(64, 32, 4, 3, 255))
            forward = Tile(128, 32, 8, 3, 128, split=True)
            blocks = Tiles(Tile(128, 64, 8, 2, 128), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2, 255))
        else:
            return cls.alike(Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 32, 4, 2)))
        return cls(few if is_causal else attrs.evolve(few, forward=forward), blocks, few)

    @classmethod
    def dropping(cls, arch: str, head_dim: int, dtype: torch.dtype, *, is_causal: bool) -> TileSizes:
        """Those for kernels that drop weights, of which none are fed: what was fastest on an H200.

        A pair takes more instructions and registers then, and larger tiles would not keep them.
        """
        if arch != PROVEN:
            return cls.elsewhere(head_dim, dtype, shared_kib(arch))
        if dtype == torch.float32 or head_dim > 128:
            return cls.of(head_dim, dtype, is_causal=is_causal)
        if head_dim <= 64:
            return cls.alike(Tiles(Tile(64, 64, 4, 3, 168), Tile(64, 64, 4, 3, 168), Tile(64, 32, 4, 3, 168)))
        blocks = Tiles(Tile(64, 32, 4, 3, 168), Tile(64, 32, 4, 3), Tile(64, 32, 4, 3, 255))
        return cls(attrs.evolve(blocks, queries=Tile(64, 64, 4, 2)), blocks, blocks)

    @classmethod
    def chosen(cls, arch: str, head_dim: int, dtype: torch.dtype, *, is_causal: bool, version: str) -> TileSizes:
        """Those for a card, as `cards.compiled_for` names it, with a release of Triton."""
        if arch != PROVEN:
            return cls.elsewhere(head_dim, dtype, shared_kib(arch))
        fed = can_be_fed(head_dim, dtype, version)
        return cls.of(head_dim, dtype, is_causal=is_causal, fed=fed)

    @classmethod
    def elsewhere(cls, head_dim: int, dtype: torch.dtype, shared_kib: int) -> TileSizes:
        """Those of other cards than Hopper's, whose programs may have so much shared memory.

        Their products take operands from registers (mma.sync). What was fastest when an H200 ran that
        (docs/performance_log.md, "Other cards").
        """
        if dtype == torch.float32:
            return cls.of(head_dim, dtype, is_causal=True)
        if head_dim <= 64:
            few = Tiles(Tile(64, 64, 4, 3, 168), Tile(64, 64, 4, 2, 168), Tile(64, 64, 4, 2))
            branches = Tiles(Tile(128, 64, 4, 3), Tile(64, 32, 4, 3, 168), Tile(64, 32, 4, 2, 168))
            return cls(branches, attrs.evolve(few, forward=Tile(128, 64, 4, 2)), few)
        if head_dim <= 128:
            few = Tiles(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2, 255))
            branches = Tiles(Tile(128, 64, 8, 2), few.queries, Tile(32, 64, 4, 2))
            return cls(branches, attrs.evolve(few, forward=Tile(128, 64, 4, 2)), few)
        stages = 2 if shared_kib >= ROOMY_KIB else 1
        return cls.alike(Tiles(Tile(64, 32, 4, stages), Tile(64, 32, 4, stages), Tile(32, 32, 4, stages)))

    @classmethod
    def alike(cls, tiles: Tiles) -> TileSizes:
        """The same tiles for everything."""
        return cls(tiles, tiles, tiles)

    @classmethod
    def _fed(cls, head_dim: int, unfed: TileSizes, *, is_causal: bool) -> TileSizes:
        if head_dim > 192:
            branches = Tiles(Tile.by_ring(64, 2, 232), Tile.by_ring(32, 3, 232), Tile.by_ring_apart(32, 3, 232))
            blocks = attrs.evolve(branches, keys=Tile.by_ring_apart(64, 2, 232))
            return cls(branches, blocks, unfed.few, unfed)
        if head_dim > 128:
            tiles = Tiles(Tile.by_ring(64, 3, 232), Tile.by_ring(64, 2, 232), Tile.by_ring_apart(64, 2, 232))
            return cls(tiles, tiles, unfed.few, unfed)
        queries = Tile.by_ring(64, 4, 232)
        if head_dim > 96:
            branches = Tiles(Tile.by_ring(128, 2, 240), queries, Tile.by_ring(32, 4, 232))
            return cls(branches, Tiles(Tile.by_ring(128, 3, 232), queries, Tile.by_ring(32, 4, 240)), unfed.few, unfed)
        if head_dim > 64:
            gradients = Tile.by_ring(64, 3, 192, adds=True)
            branches = Tiles(Tile.by_ring(128, 3, 232), queries, Tile.by_ring(64, 4, 240), gradients)
            blocks = Tiles(Tile.by_ring(64, 6, 240), queries, Tile.by_ring(32, 4, 240), gradients)
            return cls(branches, blocks, unfed.few, unfed)
        forward, two = Tile.by_ring(64, 4, 104, split=True), Tile.by_ring(64, 4, 232, split=True)
        keys = Tile.by_ring(64, 4, 232, parts=1) if is_causal else two
        gradients = Tile.by_ring(64, 4, 208, adds=True)
        return cls(
            Tiles(forward, unfed.branches.queries, keys, gradients),
            Tiles(forward, unfed.blocks.queries, two, gradients),
            unfed.few,
            unfed,
        )

    def within(self, block: int) -> Tiles:
        """For a table of blocks of that many positions, which rows and columns have to divide.

        Blocks smaller than a tile of `few` cut that.
        """
        if self.unfed is not None and block % self.blocks.forward.rows:
            return self.unfed.within(block)

        def cut(which: Pass) -> Tile:
            tile = self.blocks.of(which)
            chosen = tile if tile.rows <= block else self.few.of(which)
            return attrs.evolve(chosen, rows=min(chosen.rows, block), columns=min(chosen.columns, block))

        return Tiles(cut("forward"), cut("queries"), cut("keys"), self.blocks.gradients)
