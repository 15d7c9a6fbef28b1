"""Dense kernels on CUDA that join their pieces in one launch of our own, in Triton, where that is installed.

Shapes: B batch, S sequence, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import attrs
import torch
from torch import Tensor

from ..core.capture import is_captured
from ..core.kernel import Drops, ForOneLength, Tables, takes_dlse, takes_dropout, takes_windows
from .launching import launch
from .libraries import can_compile

if TYPE_CHECKING:
    from ..core.kernel import BlockTable, DenseKernel, DensePiece
    from ..core.layout import BlockLayout
    from ..core.slabs import Place

MOST_PIECES: Final = 32  # which take seconds to compile, once a machine
PIECES_STEP: Final = 4  # so that few kernels are compiled
MAX_LENGTH: Final = 1 << 30  # 32-bit arithmetic on positions, and the reciprocals
MAX_ROWS: Final = 1 << 31  # of all heads, counted in 32 bits
TILE_ELEMENTS: Final = 4096  # of a program with 4 warps: 32 a thread

_MERGE: Final = "merge_pieces"
_ADD: Final = "add_pieces"
_Fields = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
_NOTHING: Final[_Fields] = (0,) * 2, (0,) * 6, (0,) * 9  # a place without batch rows, whose piece is not read
_Variant = tuple[str, int, int, torch.dtype, torch.device]


def joining(kernel: DenseKernel) -> DenseKernel:
    """The kernel with `Joins` besides, where Triton is installed and finds what it compiles its launchers with."""
    if not can_compile():
        return kernel
    if isinstance(kernel, ForOneLength):
        return JoiningForOneLength(kernel, JoiningKernel(kernel.other_lengths))
    return JoiningKernel(kernel)


@attrs.frozen
class JoiningKernel:
    """A dense kernel, with the ability `Joins`; the kernels that join are compiled at their first launch.

    Attributes:
        kernel: what computes the pieces.
    """

    kernel: DenseKernel
    _launched: set[_Variant] = attrs.field(factory=set, eq=False, repr=False, kw_only=True)

    @property
    def name(self) -> str:
        """That of the kernel."""
        return self.kernel.name

    @property
    def takes_windows(self) -> bool:
        """As the kernel does."""
        return takes_windows(self.kernel)

    @property
    def takes_dlse(self) -> bool:
        """As the kernel does."""
        return takes_dlse(self.kernel)

    @property
    def takes_dropout(self) -> bool:
        """As the kernel does."""
        return takes_dropout(self.kernel)

    def dropping(self, dropout_p: float, seed: Tensor, device: torch.device) -> JoiningKernel:
        """See `Drops`; where the kernel is one."""
        assert isinstance(self.kernel, Drops)
        return JoiningKernel(self.kernel.dropping(dropout_p, seed, device), launched=self._launched)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        """See `DenseKernel`."""
        return self.kernel.forward(query, key, value, piece)

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `DenseKernel`."""
        return self.kernel.backward(dout, query, key, value, out, lse, piece)

    def table(self, blocks: BlockLayout, piece: DensePiece, device: torch.device) -> BlockTable | None:
        """As the kernel does, if it does."""
        return self.kernel.table(blocks, piece, device) if isinstance(self.kernel, Tables) else None

    def can_join(self, like: Tensor, places: Sequence[Place], *, adds: bool) -> bool:
        """As `Joins.can_join`: up to `MOST_PIECES`, of sequences below `MAX_LENGTH` and below `MAX_ROWS` in all.

        While a CUDA graph is captured, only what has been launched before, since no module can be loaded then.
        """
        batch, length, num_heads, _ = like.shape
        if len(places) > MOST_PIECES or length >= MAX_LENGTH or batch * length * num_heads >= MAX_ROWS:
            return False
        if is_captured(like.device):
            return _variant(_ADD if adds else _MERGE, like, len(places)) in self._launched
        return True

    def merge_pieces(
        self, pieces: Sequence[tuple[Tensor, Tensor]], places: Sequence[Place], out: Tensor, lse: Tensor
    ) -> None:
        """As `Joins.merge_pieces`."""
        outs, lses = zip(*pieces, strict=True)
        self._launch(_MERGE, (outs, lses), places, (out, lse))

    def add_pieces(self, pieces: Sequence[Tensor], places: Sequence[Place], total: Tensor) -> None:
        """As `Joins.add_pieces`."""
        self._launch(_ADD, (pieces,), places, (total,))

    def _launch(
        self, name: str, pieces: Sequence[Sequence[Tensor]], places: Sequence[Place], results: tuple[Tensor, ...]
    ) -> None:
        """Launch a kernel of `joining_kernels`, a program for each tile of positions of a head."""
        batch, length, num_heads, head_dim = results[0].shape
        added = -len(places) % PIECES_STEP
        fields = [fields_of(place) for place in places]
        fields += [_NOTHING] * added
        block_d = max(16, 1 << (head_dim - 1).bit_length())
        block_m = TILE_ELEMENTS // block_d
        compact = [[x.contiguous() for x in xs] for xs in pieces]
        constants = {"COUNT": len(fields), "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_M": block_m, "num_warps": 4}
        kernel: Any = getattr(import_module(".joining_kernels", __package__), name)
        with torch.cuda.device_of(results[0]):  # type: ignore[no-untyped-call]
            launch(
                kernel,
                (batch * -(-length // block_m) * num_heads,),
                (*results, *(tuple(xs + xs[:1] * added) for xs in compact)),
                (tuple(fields), length, num_heads),
                constants,
            )
        self._launched.add(_variant(name, results[0], len(places)))


@attrs.frozen
class JoiningForOneLength(JoiningKernel):
    """A `JoiningKernel` whose kernel is a `ForOneLength`.

    Attributes:
        other_lengths: as that says.
    """

    other_lengths: DenseKernel


def _variant(name: str, like: Tensor, count: int) -> _Variant:
    """Which kernel is compiled for so many pieces of such a tensor."""
    return name, -(-count // PIECES_STEP), like.shape[3], like.dtype, like.device


def fields_of(place: Place) -> _Fields:
    """What a kernel takes of a place: its batch rows, its heads, and its segments with their rows."""
    rows = place.rows
    segment_step = rows.segment_step if place.segments > 1 else MAX_LENGTH
    segments = place.segments, segment_step, *reciprocal(segment_step)
    return (
        (place.batch, place.batches),
        (rows.head, rows.head_step, *reciprocal(rows.head_step), rows.num_heads, rows.head_shift),
        (rows.start, *segments, rows.step, *reciprocal(rows.step), rows.count),
    )


def reciprocal(divisor: int) -> tuple[int, int]:
    """Multiplier and log with x // divisor == x * multiplier >> (31 + log) for 0 <= x < 2^30, of a divisor up to 2^30.

    With log = ceil(log2(divisor)), multiplier * divisor exceeds 2^(31 + log) by at most 2^log (Granlund and Montgomery
    1994). The multiplier has 32 bits, of which the first is 1; it is given as the int32 that has them.
    """
    log = (divisor - 1).bit_length()
    return (1 << (31 + log)) // divisor + 1 - (1 << 32), log
