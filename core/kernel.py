"""What a backend hands to core: a kernel for dense pieces, or one for whole layouts.

Shapes: B batch, S query length, T key length, H query heads, K key-value heads, D head_dim. Tensors may be strided
views; only their last dimension is contiguous. No tensor is empty: what has no pairs of queries and keys never reaches
a kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from .documents import Packing
    from .layout import BlockLayout, Layout
    from .slabs import Place

# Columns of head_dim that carry the gradient of lse through a dense kernel; kernels want multiples of 8.
WIDENING: Final = 8

# Capabilities that a call needs rather than a configuration: they are matched when a new length is met.
CALL_AXES: Final = ("unequal_lengths", "offsets", "varlen")


@attrs.frozen(kw_only=True)
class DensePiece:
    """A dense rectangle of queries and keys, a square under its causal diagonal, or a band of a rectangle.

    Attributes:
        is_causal: query row i sees key rows j <= i; only ever set where the lengths are equal.
        scale: factor on q·k, above 0.
        deterministic: the same bits on every run, forward and backward.
        window: (left, right) where S query rows see a window of T >= S key rows whose ends meet: row i the rows
            i + T - S - left to i + T - S + right, as far as there are such. Both are at least 0 and at most T;
            `is_causal` is then not set. Given only to kernels that take it (`Windows`).
        dlse: (B, H, S) float32, the gradient of lse of the whole row, for backward: it takes delta - dlse in the place
            of delta. Given only to kernels that take it (`TakesDlse`).
    """

    is_causal: bool
    scale: float
    deterministic: bool = False
    window: tuple[int, int] | None = None
    dlse: Tensor | None = attrs.field(default=None, eq=False, repr=False)


@attrs.frozen(kw_only=True, eq=False)
class LayoutPiece:
    """A whole lowered pattern, for kernels that compute it in one go.

    Attributes:
        layout: the lowered pattern with its geometry (lengths, offsets, causality) and the pattern it came from.
        scale: factor on q·k.
        deterministic: the same bits on every run, forward and backward.
        dropout_p: probability with which each counted occurrence is dropped after normalisation.
        seed: int64 scalar tensor that determines the dropout draw; given exactly when dropout_p > 0. On the CPU, but
            for kernels that are `DrawsOnDevice`.
        tables: the key blocks of each row of blocks where a gate chooses them per call, (B, H, R, k) int64 as
            `Gate.forward` describes them; the layout then has neither branches nor blocks. Given only to
            backends that declare dynamic_tables.
        is_part: the layout has a part of each row's keys; backward's out and lse are those of the whole row. Given
            only to backends that declare context_parallel.
        packing: the documents of the call, each of which is a sequence of its own: its tokens see what the first tokens
            of the layout see, up to the document's end. The layout is of one sequence with as many queries as keys,
            no shorter than any of them; where it has blocks, documents have as many queries as keys, at the same
            places, and if it is not causal, a document's pairs are those of the layout up to its end. Given only to
            kernels that are `Packs`.
    """

    layout: Layout
    scale: float
    deterministic: bool = False
    dropout_p: float = 0.0
    seed: Tensor | None = None
    tables: Tensor | None = None
    is_part: bool = False
    packing: Packing | None = None


class DenseKernel(Protocol):
    """Computes one `DensePiece`; core composes every layout from such pieces.

    forward: q (B, S, H, D), k and v (B, T, K, D) -> out (B, S, H, D) in q's dtype and lse (B, H, S), natural log,
    float32 (float64 for float64 inputs). backward: the gradient of that piece where `out` and `lse` are those of the
    *whole* row, merged over all pieces: with p = exp(s - lse), delta = sum(dout * out), ds = p * (dout·v - delta).
    `lse` is +inf in rows without keys, so that p is 0 there.
    """

    @property
    def name(self) -> str:
        """The pinned sub-kernel, as the plan shows it."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        """Return (out, lse)."""

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv) in the dtype of the inputs or in float32."""


@runtime_checkable
class Joins(Protocol):
    """What a `DenseKernel` may have besides: it joins the pieces of whole tensors in one pass, once all are there.

    A piece is what `forward` or `backward` returned for the rows that its `Place` names, in any dtype and with any
    strides. Sums are taken in float32 and rounded once, to the dtype of the result, which is contiguous.
    """

    def can_join(self, like: Tensor, places: Sequence[Place], *, adds: bool) -> bool:
        """Whether `merge_pieces`, or `add_pieces` where `adds`, takes pieces at these places now.

        They are of a tensor (B, S, H, D) of the shape, dtype and device of `like`.
        """

    def merge_pieces(
        self, pieces: Sequence[tuple[Tensor, Tensor]], places: Sequence[Place], out: Tensor, lse: Tensor
    ) -> None:
        """Write out (B, S, H, D) and lse (B, H, S) float32 of all pieces, of which each is an out and its lse.

        Where lse of a piece is -inf, the row has no share; rows in no piece get out 0 and lse -inf.
        """

    def add_pieces(self, pieces: Sequence[Tensor], places: Sequence[Place], total: Tensor) -> None:
        """Write the sum (B, S, H, D) of the pieces; rows in none get 0."""


@runtime_checkable
class Windows(Protocol):
    """What a `DenseKernel` may have besides: it computes sliding windows, at the cost of their pairs."""

    @property
    def takes_windows(self) -> bool:
        """Whether it takes pieces with a `window`; else windows come to it as causal squares (`band_squares`)."""


class BlockTable(Protocol):
    """Computes the pairs of one table of blocks, which is ready on one device."""

    @property
    def name(self) -> str:
        """As traces show it."""

    @property
    def nbytes(self) -> int:
        """Memory that it occupies."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return out (B, S, H, D) and lse (B, H, S); rows without keys give 0 and -inf."""

    def gradients(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv); `out` and `lse` as for `DenseKernel.backward`, `dlse` as for `LayoutKernel.backward`."""


@runtime_checkable
class Tables(Protocol):
    """What a `DenseKernel` may have besides: it computes tables of blocks, where a pattern is nothing else.

    Other tables, and those that it does not take, are core's block product's.
    """

    def table(self, blocks: BlockLayout, piece: DensePiece, device: torch.device) -> BlockTable | None:
        """What computes `blocks` with the scale of `piece`, as deterministically; None if the kernel takes no such.

        That scale may be below 0, unlike that of the pieces which the kernel computes.

        Raises:
            ConfigError: it needs more memory than is allowed.
        """


@runtime_checkable
class TakesDlse(Protocol):
    """What a `DenseKernel` may have besides: its backward takes a gradient of lse.

    Through others it comes home in `WIDENING` more columns, as far as they take that head_dim.
    """

    @property
    def takes_dlse(self) -> bool:
        """Whether it takes pieces with a `dlse`."""


@runtime_checkable
class ForOneLength(Protocol):
    """What a `DenseKernel` may be: one that prepares for every new shape of tensors, longer than most calls take.

    Where an attention was built for a `seq_len`, it gets the calls of that length alone.
    """

    @property
    def other_lengths(self) -> DenseKernel:
        """What gets all others."""


@runtime_checkable
class Drops(Protocol):
    """What the `DenseKernel` of a backend that declares dropout has besides: it drops attention weights."""

    @property
    def takes_dropout(self) -> bool:
        """Whether `dropping` may be called."""

    def dropping(self, dropout_p: float, seed: Tensor, device: torch.device) -> DenseKernel:
        """A kernel for one pass of a call, which multiplies weights by 1 / keep where a pair is kept, else by 0.

        It gets what the kernel gets, in both passes the same pieces in the same order, of compact tensors. So the
        seed, an int64 scalar on the CPU, determines what is dropped of each: other pairs in every piece, and the same
        ones forward and backward, whose tensors may have `WIDENING` more columns. lse is that of all weights.

        Args:
            dropout_p: above 0 and below 1; a kernel may round it, but then keep is exactly how often a pair is kept.
            seed: of the call.
            device: of the tensors.
        """


def takes_windows(kernel: object) -> bool:
    """Whether a dense kernel takes pieces with a `window`, of whatever length."""
    if isinstance(kernel, ForOneLength) and not takes_windows(kernel.other_lengths):
        return False
    return isinstance(kernel, Windows) and kernel.takes_windows


def takes_dlse(kernel: object) -> bool:
    """Whether a dense kernel takes pieces with a `dlse`, of whatever length."""
    if isinstance(kernel, ForOneLength) and not takes_dlse(kernel.other_lengths):
        return False
    return isinstance(kernel, TakesDlse) and kernel.takes_dlse


def takes_dropout(kernel: object) -> bool:
    """Whether a dense kernel drops attention weights."""
    return isinstance(kernel, Drops) and kernel.takes_dropout


class LayoutKernel(Protocol):
    """Computes a whole `LayoutPiece`; same shapes as `DenseKernel`, rows without keys give out 0 and lse -inf.

    backward gets lse contiguous, as forward returns it; but +inf in rows that only fill up a batch, whose dout and dlse
    are 0 and which weigh nothing, whatever keys they have. The kernel of a backend that declares `context_parallel`
    also computes parts of rows (`LayoutPiece.is_part`): the layout then holds a shard's keys at their absolute
    positions (`Geometry.whole_len` says how long the sequence is), and backward gets the out and lse of the *whole*
    rows, which mean what they mean for `DenseKernel.backward`; lse is -inf only in rows that have no key at all.

    If it declares `staged_blocks` too, it takes layouts of `blocks` alone whose keys are blocks copied together from
    anywhere: `blocks.cols` counts the copies, and what depends on positions (where keys end, causality) is in
    `blocks.masks`. The pattern, offsets and is_causal say nothing about such keys; the table says it all.
    """

    @property
    def name(self) -> str:
        """The pinned sub-kernel, as the plan shows it."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        """Return (out, lse)."""

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
        """Return (dq, dk, dv); `dlse` (B, H, S) is given where the caller uses the gradient of the returned lse."""


@runtime_checkable
class Prepares(Protocol):
    """What a `LayoutKernel` may have besides: work of its own for a layout, done when a length is first lowered."""

    def prepare(self, layout: Layout, device: torch.device) -> int:
        """Make what later calls with this layout need, so that they may be captured in a CUDA graph.

        Returns how many bytes of it are kept for as long as the layout lives: the cache of layouts counts them.
        """


@runtime_checkable
class DrawsOnDevice(Protocol):
    """What a `LayoutKernel` that drops may have besides: it takes seeds on the device, where no host reads them.

    They are given to it while a CUDA graph is captured, whose replays each draw another.
    """

    @property
    def draws_on_device(self) -> bool:
        """Whether it does."""


@runtime_checkable
class Packs(Protocol):
    """What a `LayoutKernel` may have besides: it computes all documents of a call in one go (`LayoutPiece.packing`).

    Tensors are then those of the call. If its backend declares dropout, each document drops for itself. Queries in no
    document get out 0, lse -inf and gradients 0, and so do keys; whatever stands there, NaN included, is in no result.
    """

    def prepare_packing(self, layout: Layout, packing: Packing, device: torch.device, *, deterministic: bool) -> int:
        """As `Prepares.prepare`, when these documents are first met; pieces will be `deterministic` or not."""


@runtime_checkable
class Adds(Protocol):
    """What a `LayoutKernel` of a backend that declares `staged_blocks` may have besides: its backward in parts.

    What staged blocks give is then added where it belongs, without passes of its own over whole tensors. `out`, `lse`,
    `dlse` and `dq` are contiguous.
    """

    def merge(self, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> None:
        """Merge a layout of blocks alone into what other keys gave, in place; rows without any of its keys stay."""

    def row_sums(self, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
        """What backward needs of whole rows: the same for all pieces of these rows."""

    def gradients(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, row_sums: Tensor, piece: LayoutPiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (dq, dk, dv)."""

    def gradients_of_queries(
        self,
        dout: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        row_sums: Tensor,
        piece: LayoutPiece,
        dq: Tensor | None = None,
    ) -> Tensor:
        """Return dq; of a layout of blocks alone, added to a given one in place."""

    def gradients_of_keys(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, row_sums: Tensor, piece: LayoutPiece
    ) -> tuple[Tensor, Tensor]:
        """Return (dk, dv)."""
