"""What is launched for the two kinds of parts that a layout has: its branches, and its table of blocks."""

from __future__ import annotations

from functools import cache, lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Protocol

import attrs
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ...core.counting import branch_pairs
from ...core.errors import ConfigError
from ...core.schedule import branch_name
from ..launching import launch
from . import kernels
from .draws import occurrences_of
from .drop_kernels import BYTES
from .runs import DeviceTables, Runs, documents_of
from .tiles import Pass, Tile, Tiles, ceil_div, padded
from .walks import make_tables, roomy_span

if TYPE_CHECKING:
    from triton import JITFunction

    from ...core.documents import Packing
    from ...core.geometry import Geometry
    from ...core.pattern import Branch
    from .block_tables import BlockTables

# The kernel of each pass, and its module; those for Hopper are in modules of their own.
OF_BRANCHES: Final[dict[Pass, tuple[str, str]]] = {
    "forward": ("kernels", "attend"),
    "queries": ("gradient_kernels", "gradients_of_queries"),
    "keys": ("gradient_kernels", "gradients_of_keys"),
    "gradients": ("joint_kernels", "gradients"),
}
OF_BLOCKS: Final[dict[Pass, tuple[str, str]]] = {
    "forward": ("block_kernels", "attend_blocks"),
    "queries": ("block_gradient_kernels", "block_gradients_of_queries"),
    "keys": ("block_gradient_kernels", "block_gradients_of_keys"),
    "gradients": ("joint_block_kernels", "block_gradients"),
}
_BY_COLUMNS: Final = ("keys", "gradients")  # whose tiles are of keys
_SUMS: Final = 5  # the place of the sums of dq among the tensors of gradients in one launch
STATS_ROWS: Final = 64  # a program of the kernels that only read rows
LEVEL_ROWS: Final = 256  # and of the one that only reads what is kept of them
# From this many pairs a key on, reading all keys once more costs less than the running maximum that it saves.
BOUND_FROM: Final = 768
MAX_POSITION: Final = 1 << 29  # 32-bit arithmetic on positions, with room for a segment around each


class Part(Protocol):
    """One part of a layout with its tables on the device, of `nbytes`, and its passes; `name` as traces show it.

    Where weights are dropped it tells so many `occurrences` of a pair apart.
    """

    name: str
    nbytes: int
    passes: tuple[Pass, ...]
    occurrences: int

    def run(
        self,
        which: Pass,
        pointers: tuple[Tensor, ...],
        strided: tuple[Tensor, ...],
        scales: tuple[float, ...],
        *,
        adds: bool = False,
        named: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> None:
        """Launch one program a tile of rows, query head and batch row.

        Args:
            which: forward, or the gradients of queries, of keys (and values), or of all, queries in float32 sums.
            pointers: the kernel's tensors, query first, key second.
            strided: those whose batch, row and head strides it takes.
            scales: what it takes of scales.
            adds: merge into what is there, or add to it; of blocks, forward and for queries.
            named: the blocks of this call, as `LayoutPiece.tables`.
            draws: of `draws.draws_of`, where weights are dropped; its tables then have occurrences apart.
        """


def _options(query: Tensor, strided: tuple[Tensor, ...], tile: Tile) -> dict[str, Any]:
    """What all kernels are compiled for."""
    is_wide = any(x.shape[1] * max(x.stride(1), BYTES.value) >= 1 << 31 for x in strided)
    return _options_of(tile, query.shape[3], query.dtype, is_wide)


@cache
def _options_of(tile: Tile, head_dim: int, dtype: torch.dtype, is_wide: bool) -> dict[str, Any]:
    options: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": tile.span(head_dim),
        "BLOCK_N": tile.columns,
        "WIDE": is_wide,
        "num_warps": tile.warps,
    }
    if tile.parts:
        options |= {"STAGES": tile.stages, "maxnreg": tile.begin}
        options |= {"PART_REGISTERS": tile.registers, "FEED_REGISTERS": tile.feeding}
        return options | ({"ADD_REGISTERS": tile.adding} if tile.adds else {})
    precision = "ieee" if dtype == torch.float32 else "tf32"
    options |= {"BLOCK_M": tile.rows, "PRECISION": precision, "num_stages": tile.stages}
    return options | ({"maxnreg": tile.registers} if tile.registers else {})


def _kernels(tiles: Tiles, *, of_blocks: bool) -> dict[Pass, JITFunction]:
    """The kernel of each pass, over branches or over blocks.

    Raises:
        ConfigError: a tile of parts that none is made for.
    """
    found: dict[Pass, JITFunction] = {}
    for which in tiles.passes:
        module, name = (OF_BLOCKS if of_blocks else OF_BRANCHES)[which]
        tile = tiles.of(which)
        if tile.apart and which != "keys":
            raise ConfigError(f"a tile with dk and dv apart serves gradients of keys alone, not {name}")
        if tile.parts == 1 and not tile.apart and name != "gradients_of_keys":
            raise ConfigError(f"a ring with 1 part serves gradients_of_keys alone, not {name}; take a tile with 2")
        if tile.parts and tile.stages < 2:
            raise ConfigError(
                f"a ring needs 2 stages at least, not {tile.stages}: {name} may hold the tiles of 2 steps"
            )
        if tile.adds != (which == "gradients"):
            raise ConfigError(f"a tile that adds serves gradients in one launch, and these need one: not {name}")
        # Imported when they are chosen: other releases of Triton cannot read those for Hopper.
        found[which] = getattr(import_module(f".{'hopper_' if tile.parts else ''}{module}", __package__), name)
    return found


def in_lines(x: Tensor) -> Tensor:
    """Rows that begin at multiples of 16 bytes, which is what kernels copy at once: x itself, or else a copy."""
    step = 16 // x.element_size()
    if x.data_ptr() % 16 == 0 and all(stride % step == 0 for stride in x.stride()[:3]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _strides(strided: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(stride for x in strided for stride in x.stride()[:3])


@lru_cache(maxsize=64)
def known_tables(
    branches: tuple[Branch, ...],
    is_causal: bool,
    transposed: bool,
    span: int,
    device: torch.device,
    apart: tuple[int, ...] = (),
) -> DeviceTables:
    """The tables for branches over positions below `span`, kept: lengths that are new at every call share them."""
    with _disable_current_modes():  # no fake tensors among those that are kept
        made = make_tables(branches, is_causal=is_causal, transposed=transposed, span=span, apart=apart)
        return DeviceTables.of(made, device)


class BranchPart:
    """All branches of a layout, or those of all documents of a call.

    Where they hold many pairs, the forward pass first finds the largest key of each head: with that bound of the
    scores the softmax needs no running maximum. Float16 has too few exponents for it. Where occurrences are to be
    `apart`, each is computed by itself.

    Raises:
        ConfigError: for positions beyond `MAX_POSITION`.
    """

    def __init__(
        self,
        branches: tuple[Branch, ...],
        geometry: Geometry,
        tiles: Tiles,
        device: torch.device,
        bound_from: int,
        packing: Packing | None = None,
        *,
        deterministic: bool = False,
        apart: bool = False,
    ) -> None:
        positions = (geometry.q_offset, geometry.kv_offset, geometry.seq_len)
        if max(map(abs, positions)) >= MAX_POSITION:
            raise ConfigError(
                f"positions from {min(positions):,} to {max(positions):,}: the fused kernel takes positions below "
                f"{MAX_POSITION:,}; use another backend"
            )
        self.name = ", ".join(branch_name(branch.segment_length, branch.stride) for branch in branches)
        self.passes = tiles.passes
        if apart:
            branches = tuple(attrs.evolve(branch, weight=1) for branch in branches for _ in range(branch.weight))
        numbers = occurrences_of(branches) if apart else ()
        self.occurrences = max(numbers, default=0) + 1
        self._group_size = geometry.group_size
        q_low, k_low = geometry.q_offset, geometry.kv_offset
        self._ends = q_low, q_low + geometry.q_len, k_low, k_low + geometry.kv_len
        self._tiles = tiles
        self._kernels = _kernels(tiles, of_blocks=False)
        pairs = sum(branch_pairs(branch, geometry) for branch in branches)
        self._bounds = pairs >= bound_from * geometry.kv_len * geometry.num_kv_heads
        span = 0 if min(positions) < 0 else roomy_span(branches, geometry.seq_len)
        self._tables = tuple(
            known_tables(branches, geometry.is_causal, side, span, device, numbers) for side in (False, True)
        )
        self._packing = packing
        self._limits = self._ends if packing is None else (0, packing.q_len, 0, packing.kv_len)
        self._listed: dict[Pass, Runs] = {}
        ahead = tiles.passes
        if packing is not None and tiles.gradients is not None:  # the next call may have others: what this one needs
            ahead = ("forward", "queries", "keys") if deterministic else ("forward", "gradients")
        self.nbytes = sum(x.nbytes for x in self._tables) + sum(self._runs(which).nbytes for which in ahead)

    def _runs(self, which: Pass) -> Runs:
        """Those of a pass, listed once; of documents beyond `nbytes` where the same bits are wished for later."""
        if which not in self._listed:
            tile, transposed = self._tiles.of(which), which in _BY_COLUMNS
            queries, keys = self._ends[:2], self._ends[2:]
            rows, columns = (keys, queries) if transposed else (queries, keys)
            tables, documents = self._tables[transposed], None
            if self._packing is not None:
                period = tables.host.period
                documents = documents_of(self._packing, tile.rows * period, period, transposed=transposed)
            with _disable_current_modes():
                self._listed[which] = Runs.of(tables, tile, rows, columns, documents)
        return self._listed[which]

    def run(
        self,
        which: Pass,
        pointers: tuple[Tensor, ...],
        strided: tuple[Tensor, ...],
        scales: tuple[float, ...],
        *,
        adds: bool = False,
        named: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> None:
        """As `Part.run`."""
        assert not adds
        assert named is None
        query, tile = pointers[0], self._tiles.of(which)
        tables, runs, is_packed = self._tables[which in _BY_COLUMNS], self._runs(which), self._packing is not None
        constants: dict[str, int] = {"SPLIT": tile.split, "SHIFTS": tables.host.shifts, "PACKED": is_packed}
        if tile.parts and not tile.adds:
            constants["PARTS"] = tile.parts
        if tile.parts and which == "keys":
            constants["APART"] = tile.apart
        if which == "forward":
            pointers, constants["BOUNDED"] = _bounded(pointers, self._bounds)
        batch = 1 if is_packed else query.shape[0]
        pointers = (
            *pointers,
            tables.head_kind,
            *tables.rows,
            tables.walks,
            tables.bias,
            runs.start,
            runs.runs,
            runs.totals,
            runs.documents,
        )
        if not tile.parts:
            pointers, constants["DROPS"] = _dropping(pointers, draws)
        numbers = (
            *_strides(strided),
            *self._limits,
            runs.origin,
            *scales,
            query.shape[2],
            self._group_size,
            *tables.host.sizes,
            runs.blocks,
            runs.block_runs,
        )
        grid = runs.blocks * tables.host.period * query.shape[2], batch
        launch(self._kernels[which], grid, pointers, numbers, constants | _options(query, strided, tile))


def _bounded(pointers: tuple[Tensor, ...], bounds: bool) -> tuple[tuple[Tensor, ...], bool]:
    """With the largest key of each head where scores are bounded, else with a place for it; and whether they are."""
    bounds = bounds and pointers[0].dtype != torch.float16
    return (*pointers, _largest(pointers[1]) if bounds else pointers[-1]), bounds


def _dropping(pointers: tuple[Tensor, ...], draws: Tensor | None) -> tuple[tuple[Tensor, ...], bool]:
    """With the draws where weights are dropped, else with a place for them; and whether they are."""
    return (*pointers, pointers[-1] if draws is None else draws), draws is not None


def _largest(key: Tensor) -> Tensor:
    """The largest squared norm of a key of each head, (B, K) float32."""
    batch, length, heads, head_dim = key.shape
    largest = torch.zeros((batch, heads), dtype=torch.int32, device=key.device)
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": padded(head_dim), "BLOCK_M": STATS_ROWS}
    grid = ceil_div(length, STATS_ROWS) * heads, batch
    launch(kernels.largest_rows, grid, (key, largest), (*key.stride()[:3], length, heads), constants)
    return largest.view(torch.float32)


class Blocks(Protocol):
    """Tables of blocks on a device, in both directions."""

    @property
    def geometry(self) -> Geometry:
        """Lengths, heads and positions."""

    @property
    def block_size(self) -> int:
        """Queries and keys of a block."""

    @property
    def pairs(self) -> int:
        """How many are counted, over all query heads of a batch row."""

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""

    @property
    def occurrences(self) -> int:
        """The most of a pair, where they are apart."""

    def tables(self, named: Tensor | None, *, transposed: bool) -> BlockTables:
        """One direction; `named` as `LayoutPiece.tables`."""


class BlockPart:
    """The table of blocks of a layout."""

    def __init__(self, blocks: Blocks, tiles: Tiles, bound_from: int) -> None:
        self.name = f"blocks of {blocks.block_size}"
        self.nbytes = blocks.nbytes
        self.passes = tiles.passes
        self.occurrences = blocks.occurrences
        self._blocks = blocks
        self._tiles = tiles
        self._kernels = _kernels(tiles, of_blocks=True)
        self._bounds = blocks.pairs >= bound_from * blocks.geometry.kv_len * blocks.geometry.num_kv_heads

    def run(
        self,
        which: Pass,
        pointers: tuple[Tensor, ...],
        strided: tuple[Tensor, ...],
        scales: tuple[float, ...],
        *,
        adds: bool = False,
        named: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> None:
        """As `Part.run`."""
        geometry, (query, key, *_) = self._blocks.geometry, pointers
        tile = self._tiles.of(which)
        tables = self._blocks.tables(named, transposed=which in _BY_COLUMNS)
        tiles, is_packed = tables.programs * (tables.block_size // tile.rows), tables.packed is not None
        constants: dict[str, Any] = {}
        if which not in _BY_COLUMNS:
            constants = {"ADDS": adds, "IN_ORDER": is_packed and not geometry.is_causal}
        if which == "keys" and tile.parts:
            constants["APART"] = tile.apart
        if which == "forward" and tile.parts:
            pointers, constants["BOUNDED"] = _bounded(pointers, self._bounds)
        if which == "gradients":
            sums = pointers[_SUMS]
            boxes = import_module(".hopper_joint_block_kernels", __package__).boxes_of_sums(
                sums, tile.columns, tile.span(sums.shape[3])
            )
            pointers = (*pointers[:_SUMS], *boxes, *pointers[_SUMS + 1 :])
            strided = tuple(x for x in strided if x is not sums)
        pointers = (*pointers, *tables.tensors, *(tables.packed or tables.tensors[:2]))  # any, where none is read
        if not tile.parts:
            pointers, constants["DROPS"] = _dropping(pointers, draws)
        numbers = (
            *_strides(strided),
            *((query.shape[1], key.shape[1]) if is_packed else (geometry.q_len, geometry.kv_len)),
            *scales,
            query.shape[2],
            geometry.group_size,
            tables.block_rows,
            tables.batch_tables,
            tables.leading,
        )
        constants |= {"BLOCK": tables.block_size, "PACKED": is_packed}
        grid = tiles * query.shape[2], 1 if is_packed else query.shape[0]
        launch(self._kernels[which], grid, pointers, numbers, constants | _options(query, strided, tile))
