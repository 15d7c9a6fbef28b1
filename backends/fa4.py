"""The `fa4` backend: FlashAttention-4, CuTe DSL kernels of the distribution flash-attn-4, on Hopper.

Dense pieces and windows are its own, and so are tables of blocks of 128. The kernels are compiled in the process when
they first meet a head_dim, dtype, causality and few or many blocks; that takes seconds, so calls that a CUDA graph will
capture must have run once before. What is called is not public, hence the manifest asks for one release.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import attrs
import torch

from ..core.refusal import Refusal
from .fa4_tables import FlashAttention4Table, checked, takes
from .joining import joining
from .libraries import aligned, checked_options, first_line, labelled

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.kernel import DenseKernel, DensePiece
    from ..core.layout import BlockLayout
    from ..registry.specs import Request

_DISTRIBUTION: Final = "flash-attn-4"


class Fa4Backend:
    """FlashAttention-4: bfloat16 and float16, the head_dims of the manifest, on sm_90. It has no options."""

    def refusals(self, request: Request) -> Iterator[Refusal]:
        """A library that cannot be imported: it stands on four others that it compiles with."""
        checked_options(request, "fa4")
        try:
            _interface()
        except (ImportError, OSError) as error:
            actual = f"one that cannot be imported ({first_line(error)})"
            yield Refusal("not_installed", labelled(_DISTRIBUTION), actual, f"pip install '{_DISTRIBUTION}[cu13]'")

    def pin(self, request: Request) -> str:
        """The kernel with its release."""
        return f"FlashAttention-4 ({labelled(_DISTRIBUTION)})"

    def build(self, request: Request) -> DenseKernel:
        """The kernel; nothing is compiled yet."""
        limit_bytes = request.config.limits.layout_bytes
        return joining(FlashAttention4(self.pin(request), *_interface(), limit_bytes))


def _interface() -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]:
    """Forward and backward of the library."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    return _flash_attn_fwd, _flash_attn_bwd


@attrs.frozen
class FlashAttention4:
    """A dense kernel: strided inputs are read where they lie, lse is float32 with natural logarithm.

    Attributes:
        name: with the release.
        run_forward: the library's forward.
        run_backward: its backward.
        limit_bytes: most bytes of a table's lists and masks.
    """

    name: str
    run_forward: Callable[..., tuple[Tensor, ...]]
    run_backward: Callable[..., tuple[Tensor, ...]]
    limit_bytes: int
    takes_windows: bool = True
    takes_dlse: bool = True

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        """See `DenseKernel`. The library launches on the current device, whatever its inputs are on."""
        left, right = piece.window or (None, None)
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            out, lse, *_ = self.run_forward(
                *aligned(query, key, value),
                softmax_scale=piece.scale,
                causal=piece.is_causal,
                window_size_left=left,
                window_size_right=right,
                return_lse=True,
            )
        return out, lse

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `DenseKernel`."""
        query, key, value, out, dout = aligned(query, key, value, out, dout)
        left, right = piece.window or (None, None)
        with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
            dq, dk, dv = self.run_backward(
                query,
                key,
                value,
                out,
                dout,
                lse.contiguous(),
                softmax_scale=piece.scale,
                causal=piece.is_causal,
                window_size_left=left,
                window_size_right=right,
                dlse=None if piece.dlse is None else piece.dlse.contiguous(),
            )
        return dq, dk, dv

    def table(self, blocks: BlockLayout, piece: DensePiece, device: torch.device) -> FlashAttention4Table | None:
        """See `Tables`: blocks of 128 whose pairs count once. Its maxima are those of a scale above 0."""
        if piece.scale <= 0 or piece.deterministic or not takes(blocks):
            return None
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        listed, size = checked(blocks, self.limit_bytes), (blocks.block_size, blocks.block_size)
        return FlashAttention4Table(
            f"{self.name}, blocks of {blocks.block_size}",
            piece.scale,
            self.run_forward,
            self.run_backward,
            of_queries=BlockSparseTensorsTorch(*listed.lists(device, of_keys=False), block_size=size),
            of_keys=BlockSparseTensorsTorch(*listed.lists(device, of_keys=True), block_size=size),
            masks=listed.bits(blocks, device),
        )
