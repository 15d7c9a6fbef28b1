"""The `fa4` backend: FlashAttention-4, CuTe DSL kernels of the distribution flash-attn-4, on Hopper.

Dense pieces and windows are its own, and so are tables of blocks of 128. The kernels are compiled in the process when
they first meet a head_dim, dtype, causality or window, number of query heads to one of keys, inputs that are repeated
by a stride of 0, and backward few or many blocks; that takes seconds, so calls that a CUDA graph will capture must have
run once before. What is called is not public, hence the manifest asks for one release.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import attrs

from ..core.refusal import Refusal
from . import fa4_dense
from .fa4_library import Library
from .fa4_tables import FlashAttention4Table, checked, takes
from .joining import joining
from .libraries import first_line, labelled

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..core.kernel import DenseKernel, DensePiece
    from ..core.layout import BlockLayout
    from ..registry.specs import Request

_DISTRIBUTION: Final = "flash-attn-4"


class Fa4Backend:
    """FlashAttention-4: bfloat16 and float16, the head_dims of the manifest, on sm_90."""

    def refusals(self, request: Request) -> Iterator[Refusal]:
        """A library that cannot be imported: it stands on four others that it compiles with."""
        try:
            Library.load()
        except (ImportError, OSError) as error:
            actual = f"one that cannot be imported ({first_line(error)})"
            yield Refusal("not_installed", labelled(_DISTRIBUTION), actual, f"pip install '{_DISTRIBUTION}[cu13]'")

    def pin(self, request: Request) -> str:
        """The kernel with its release."""
        return f"FlashAttention-4 ({labelled(_DISTRIBUTION)})"

    def build(self, request: Request) -> DenseKernel:
        """The kernel; nothing is compiled yet."""
        limit_bytes = request.config.limits.layout_bytes
        return joining(FlashAttention4(self.pin(request), Library.load(), limit_bytes))


@attrs.frozen
class FlashAttention4:
    """A dense kernel, and one for tables of blocks.

    Attributes:
        name: with the release.
        library: what it calls, but for the forward of dense pieces (`fa4_dense`).
        limit_bytes: most bytes of a table's lists and masks.
    """

    name: str
    library: Library
    limit_bytes: int
    takes_windows: bool = True
    takes_dlse: bool = True

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        """See `DenseKernel`."""
        return fa4_dense.forward(query, key, value, piece)

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `DenseKernel`."""
        return self.library.backward(dout, query, key, value, out, lse, piece.dlse, piece.scale, _said(piece))

    def table(self, blocks: BlockLayout, piece: DensePiece, device: torch.device) -> FlashAttention4Table | None:
        """See `Tables`: blocks of 128 whose pairs count once. Its maxima are those of a scale above 0."""
        if piece.scale <= 0 or piece.deterministic or not takes(blocks):
            return None
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        listed, size = checked(blocks, self.limit_bytes), (blocks.block_size, blocks.block_size)
        return FlashAttention4Table(
            f"{self.name}, blocks of {blocks.block_size}",
            piece.scale,
            self.library,
            of_queries=BlockSparseTensorsTorch(*listed.lists(device, of_keys=False), block_size=size),
            of_keys=BlockSparseTensorsTorch(*listed.lists(device, of_keys=True), block_size=size),
            masks=listed.bits(blocks, device),
        )


def _said(piece: DensePiece) -> dict[str, object]:
    """Of a piece, what of the scores counts."""
    left, right = piece.window or (None, None)
    return {"causal": piece.is_causal, "window_size_left": left, "window_size_right": right}
