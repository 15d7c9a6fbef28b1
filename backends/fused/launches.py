"""What is launched for the two kinds of parts that a layout has: its branches, and its table of blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import torch
from torch import Tensor

from ...core.counting import branch_pairs
from ...core.errors import ConfigError
from ...core.schedule import branch_name
from . import block_kernels, gradient_kernels, kernels
from .block_tables import BlockTables
from .runs import DeviceTables, Runs
from .tiles import Tile, Tiles, ceil_div, padded
from .walks import make_tables

if TYPE_CHECKING:
    from triton import JITFunction

    from ...core.geometry import Geometry
    from ...core.layout import BlockLayout
    from ...core.pattern import Branch

Pass = Literal["forward", "queries", "keys"]
PASSES: Final[tuple[Pass, ...]] = ("forward", "queries", "keys")
STATS_ROWS: Final = 64  # a program of the kernels that only read rows
# From this many pairs a key on, reading all keys once more costs less than the running maximum that it saves.
BOUND_FROM: Final = 768
MAX_POSITION: Final = 1 << 29  # 32-bit arithmetic on positions, with room for a segment around each


class Part(Protocol):
    """One part of a layout with its tables on the device, of `nbytes`; `name` as traces show it."""

    name: str
    nbytes: int

    def run(
        self,
        which: Pass,
        pointers: tuple[Tensor, ...],
        strided: tuple[Tensor, ...],
        scales: tuple[float, ...],
        *,
        adds: bool = False,
    ) -> None:
        """Launch one program a tile of rows, query head and batch row.

        Args:
            which: forward, or the gradients of queries or keys (and values).
            pointers: the kernel's tensors, query first, key second.
            strided: those whose batch, row and head strides it takes.
            scales: what it takes of scales.
            adds: merge into what is there, or add to it; of blocks, forward and for queries.
        """


def _options(query: Tensor, strided: tuple[Tensor, ...], tile: Tile) -> dict[str, Any]:
    """What all kernels are compiled for."""
    head_dim = query.shape[3]
    precision = "ieee" if query.dtype == torch.float32 else "tf32"
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded(head_dim),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "WIDE": any(x.shape[1] * x.stride(1) >= 1 << 31 for x in strided),
        "num_warps": tile.warps,
        **({"STAGES": tile.stages} if tile.by_hand else {"PRECISION": precision, "num_stages": tile.stages}),
        **({"maxnreg": tile.registers} if tile.registers else {}),
    }


def _of_branches(tiles: Tiles) -> dict[Pass, JITFunction]:
    """The kernels over branches."""
    found: dict[Pass, JITFunction] = {
        "forward": kernels.attend,
        "queries": gradient_kernels.gradients_of_queries,
        "keys": gradient_kernels.gradients_of_keys,
    }
    if tiles.queries.by_hand or tiles.keys.by_hand:
        from . import hopper_kernels  # other releases of Triton cannot read it

        found |= {"queries": hopper_kernels.gradients_of_queries} if tiles.queries.by_hand else {}
        found |= {"keys": hopper_kernels.gradients_of_keys} if tiles.keys.by_hand else {}
    return found


def _strides(strided: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(stride for x in strided for stride in x.stride()[:3])


class BranchPart:
    """All branches of a layout.

    Where they hold many pairs, the forward pass first finds the largest key of each head: with that bound of the
    scores the softmax needs no running maximum. Float16 has too few exponents for it.

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
    ) -> None:
        positions = (geometry.q_offset, geometry.kv_offset, geometry.seq_len)
        if max(map(abs, positions)) >= MAX_POSITION:
            raise ConfigError(
                f"positions from {min(positions):,} to {max(positions):,}: the fused kernel takes positions below "
                f"{MAX_POSITION:,}; use another backend"
            )
        self.name = ", ".join(branch_name(branch.segment_length, branch.stride) for branch in branches)
        span = 0 if min(positions) < 0 else geometry.seq_len
        self._geometry = geometry
        self._tiles = tiles
        self._kernels = _of_branches(tiles)
        pairs = sum(branch_pairs(branch, geometry) for branch in branches)
        self._bounds = pairs >= bound_from * geometry.kv_len * geometry.num_kv_heads
        by_rows, by_columns = (
            DeviceTables.of(make_tables(branches, is_causal=geometry.is_causal, transposed=side, span=span), device)
            for side in (False, True)
        )
        queries = geometry.q_offset, geometry.q_offset + geometry.q_len
        keys = geometry.kv_offset, geometry.kv_offset + geometry.kv_len
        self._limits = (*queries, *keys)
        self._listed = {
            which: (by_columns, Runs.of(by_columns, tiles.of(which), keys, queries))
            if which == "keys"
            else (by_rows, Runs.of(by_rows, tiles.of(which), queries, keys))
            for which in PASSES
        }
        self.nbytes = by_rows.nbytes + by_columns.nbytes + sum(runs.nbytes for _, runs in self._listed.values())

    def run(
        self,
        which: Pass,
        pointers: tuple[Tensor, ...],
        strided: tuple[Tensor, ...],
        scales: tuple[float, ...],
        *,
        adds: bool = False,
    ) -> None:
        """As `Part.run`."""
        assert not adds
        query, tile = pointers[0], self._tiles.of(which)
        tables, runs = self._listed[which]
        constants = {"SPLIT": tile.split, "SHIFTS": tables.host.shifts}
        if which == "forward":
            constants["BOUNDED"] = self._bounds and query.dtype != torch.float16
            pointers = (*pointers, _largest(pointers[1]) if constants["BOUNDED"] else pointers[-1])
        self._kernels[which][(runs.blocks * tables.host.period * query.shape[2], query.shape[0])](
            *pointers,
            tables.head_kind,
            *tables.rows,
            tables.walks,
            tables.bias,
            runs.start,
            runs.runs,
            runs.totals,
            *_strides(strided),
            *self._limits,
            runs.origin,
            *scales,
            query.shape[2],
            self._geometry.group_size,
            *tables.host.sizes,
            runs.blocks,
            runs.block_runs,
            **constants,
            **_options(query, strided, tile),
        )


def _largest(key: Tensor) -> Tensor:
    """The largest squared norm of a key of each head, (B, K) float32."""
    batch, length, heads, head_dim = key.shape
    largest = torch.zeros((batch, heads), dtype=torch.int32, device=key.device)
    kernels.largest_rows[(ceil_div(length, STATS_ROWS) * heads, batch)](
        key,
        largest,
        *key.stride()[:3],
        length,
        heads,
        HEAD_DIM=head_dim,
        BLOCK_D=padded(head_dim),
        BLOCK_M=STATS_ROWS,
    )
    return largest.view(torch.float32)


class BlockPart:
    """The table of blocks of a layout."""

    _KERNELS: Final = {
        "forward": block_kernels.attend_blocks,
        "queries": block_kernels.block_gradients_of_queries,
        "keys": block_kernels.block_gradients_of_keys,
    }

    def __init__(self, layout: BlockLayout, tiles: Tiles, device: torch.device) -> None:
        self.name = f"blocks of {layout.block_size}"
        self._geometry = layout.geometry
        self._tiles = tiles
        self._by_rows, self._by_columns = (
            BlockTables.of(layout, device, transposed=transposed) for transposed in (False, True)
        )
        self.nbytes = sum(x.nbytes for tables in (self._by_rows, self._by_columns) for x in tables.tensors)

    def run(
        self,
        which: Pass,
        pointers: tuple[Tensor, ...],
        strided: tuple[Tensor, ...],
        scales: tuple[float, ...],
        *,
        adds: bool = False,
    ) -> None:
        """As `Part.run`."""
        geometry, query = self._geometry, pointers[0]
        tile = self._tiles.of(which)
        tables = self._by_columns if which == "keys" else self._by_rows
        tiles = tables.block_rows * (tables.block_size // tile.rows)
        self._KERNELS[which][(tiles * query.shape[2], query.shape[0])](
            *pointers,
            *tables.tensors,
            *_strides(strided),
            geometry.q_len,
            geometry.kv_len,
            *scales,
            query.shape[2],
            geometry.group_size,
            tables.block_rows,
            BLOCK=tables.block_size,
            **({} if which == "keys" else {"ADDS": adds}),
            **_options(query, strided, tile),
        )
