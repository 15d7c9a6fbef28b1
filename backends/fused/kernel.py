"""The kernel that runs the fused launches over a layout of branches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import attrs
import torch
import triton
from torch import Tensor

from ...core.errors import ConfigError
from . import kernels
from .walks import Tables, make_tables

if TYPE_CHECKING:
    from ...core.geometry import Geometry
    from ...core.kernel import LayoutPiece
    from ...core.layout import Layout

_LOG2_E: Final = 1.4426950408889634
MAX_POSITION: Final = 1 << 29  # 32-bit arithmetic on positions, with room for a segment around each


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


@attrs.frozen(eq=False)
class _OnDevice:
    """`Tables` where the kernels read them."""

    host: Tables
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, host: Tables, device: torch.device) -> _OnDevice:
        arrays = (
            host.head_kind,
            host.slot_group,
            host.slot_index,
            host.group_size,
            host.group_start,
            host.residues,
            host.counts,
            host.walks,
            host.bias,
        )
        return cls(host, tuple(torch.from_numpy(array).to(device) for array in arrays))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Period, groups and walks: how the tables are strided."""
        return self.host.period, self.host.counts.shape[1], self.host.walks.shape[2]


def _check_positions(geometry: Geometry) -> None:
    positions = (geometry.q_offset, geometry.kv_offset, geometry.seq_len)
    if max(map(abs, positions)) >= MAX_POSITION:
        raise ConfigError(
            f"positions from {min(positions):,} to {max(positions):,}: the fused kernel takes positions below "
            f"{MAX_POSITION:,}; use another backend"
        )


class FusedKernel:
    """Computes a `LayoutPiece` of branches: one launch forward, three backward, the same bits on every run.

    Args:
        name: the pinned sub-kernel, as the plan shows it.
        tiles: of the three kernels.
    """

    def __init__(self, name: str, tiles: Tiles) -> None:
        self.name = name
        self.tiles = tiles
        self._tables: WeakKeyDictionary[Layout, dict[tuple[bool, torch.device], _OnDevice]] = WeakKeyDictionary()

    def prepare(self, layout: Layout, device: torch.device) -> None:
        """Make the tables of a layout ahead of its first call, which may be captured in a CUDA graph."""
        for transposed in (False, True):
            self.tables(layout, device, transposed=transposed)

    def tables(self, layout: Layout, device: torch.device, *, transposed: bool) -> _OnDevice:
        """The walks of a layout on its device; made once."""
        known = self._tables.setdefault(layout, {})
        found = known.get((transposed, device))
        if found is None:
            geometry = layout.geometry
            span = 0 if min(geometry.q_offset, geometry.kv_offset) < 0 else geometry.seq_len
            _check_positions(geometry)
            host = make_tables(layout.branches, is_causal=geometry.is_causal, transposed=transposed, span=span)
            found = known[transposed, device] = _OnDevice.of(host, device)
        return found

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        """As `LayoutKernel.forward`."""
        geometry = piece.layout.geometry
        batch, length, heads, _ = query.shape
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        lse = torch.empty((batch, heads, length), dtype=torch.float32, device=query.device)
        if piece.scale < 0:
            query = -query
        tables = self.tables(piece.layout, query.device, transposed=False)
        self._launch(
            kernels.attend,
            self.tiles.forward,
            tables,
            (query, key, value, out, lse),
            (query, key, value, out),
            geometry,
            (abs(piece.scale) * _LOG2_E,),
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        piece: LayoutPiece,
        *,
        dlse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `LayoutKernel.backward`."""
        geometry, layout = piece.layout.geometry, piece.layout
        batch, _, heads, head_dim = query.shape
        kv_heads, group = key.shape[2], heads // key.shape[2]
        stats = self._stats(dout, out, lse, dlse)
        dq = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        # Query heads that share a key-value head write apart and are summed after: no atomics, so the same bits always.
        shape = (batch, key.shape[1], heads, head_dim)
        dtype = key.dtype if group == 1 else torch.float32
        dk, dv = (torch.empty(shape, dtype=dtype, device=key.device) for _ in range(2))
        scale = abs(piece.scale)
        if piece.scale < 0:
            query = -query
        scales = (scale * _LOG2_E, scale)
        inputs = (query, key, value, dout, stats)
        strided = (query, key, value, dout)
        tables = self.tables(layout, query.device, transposed=False)
        self._launch(
            kernels.gradients_of_queries, self.tiles.queries, tables, (*inputs, dq), (*strided, dq), geometry, scales
        )
        tables = self.tables(layout, query.device, transposed=True)
        self._launch(
            kernels.gradients_of_keys,
            self.tiles.keys,
            tables,
            (*inputs, dk, dv),
            (*strided, dk),
            geometry,
            scales,
            rows_are_keys=True,
        )
        if piece.scale < 0:
            dq = -dq
        if group > 1:
            grouped = (batch, key.shape[1], kv_heads, group, head_dim)
            dk, dv = (x.view(grouped).sum(3).to(key.dtype) for x in (dk, dv))
        return dq, dk, dv

    def _stats(self, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
        """What backward needs of each row, (B, H, S) pairs of float32 as int64: lse in base 2 and delta."""
        batch, length, heads, head_dim = out.shape
        stats = torch.empty((*lse.shape, 2), dtype=torch.float32, device=lse.device)
        rows = 64
        if lse.numel():
            kernels.prepare_rows[(triton.cdiv(length, rows) * heads, batch)](
                dout,
                out,
                lse,
                lse if dlse is None else dlse.contiguous(),
                stats,
                *dout.stride()[:3],
                *out.stride()[:3],
                length,
                heads,
                HAS_DLSE=dlse is not None,
                HEAD_DIM=head_dim,
                BLOCK_D=triton.next_power_of_2(head_dim),
                BLOCK_M=rows,
            )
        return stats.view(torch.int64).squeeze(-1)

    def _launch(
        self,
        kernel: Any,
        tile: Tile,
        tables: _OnDevice,
        pointers: tuple[Tensor, ...],
        strided: tuple[Tensor, ...],
        geometry: Geometry,
        scales: tuple[float, ...],
        *,
        rows_are_keys: bool = False,
    ) -> None:
        """One program a tile of rows, query head and batch row."""
        query = pointers[0]
        batch, _, heads, head_dim = query.shape
        q_low, k_low = geometry.q_offset, geometry.kv_offset
        q_high, k_high = q_low + geometry.q_len, k_low + geometry.kv_len
        low, high = (k_low, k_high) if rows_are_keys else (q_low, q_high)
        period = tables.host.period
        origin = low // period * period
        tiles = triton.cdiv(high - origin, tile.rows * period) * period
        if low == high or batch == 0:
            return
        kernel[(tiles * heads, batch)](
            *pointers,
            *tables.tensors,
            *(stride for x in strided for stride in x.stride()[:3]),
            q_low,
            q_high,
            k_low,
            k_high,
            origin,
            *scales,
            heads,
            geometry.group_size,
            *tables.sizes,
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            SPLIT=tile.split,
            WIDE=any(x.shape[1] * x.stride(1) >= 1 << 31 for x in strided),
            num_warps=tile.warps,
            num_stages=tile.stages,
            **({"maxnreg": tile.registers} if tile.registers else {}),
        )
