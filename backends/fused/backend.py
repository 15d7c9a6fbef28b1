"""The `triton` backend: what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import torch

from ...core.geometry import Geometry
from ...core.lowering import lower
from ...core.refusal import Refusal
from ..libraries import checked_options, labelled
from .kernel import FusedKernel
from .tiles import TileSizes, can_be_fed
from .walks import MAX_PERIOD, period_of

MIN_BLOCK: Final = 16  # what a product of tiles takes

if TYPE_CHECKING:
    from ...core.layout import Layout
    from ...registry.specs import Request


class TritonBackend:
    """All branches, or all blocks, in one launch of our own kernels. It has no options."""

    def refusals(self, request: Request) -> Iterator[Refusal]:
        """Dilation rates whose classes of positions repeat too late, and sizes of blocks that no tile divides."""
        checked_options(request, "triton")
        layout = self._layout(request)
        period = period_of(layout.branches)
        if period > MAX_PERIOD:
            required = f"dilation rates with the least common multiple {period}"
            yield Refusal("dilation_rates", required, f"up to {MAX_PERIOD}", "use rates that divide one another")
        size = layout.blocks.block_size if layout.blocks is not None else MIN_BLOCK
        if size < MIN_BLOCK or size & (size - 1):
            yield Refusal("block_sizes", str(size), f"powers of two from {MIN_BLOCK}", "choose such a block_size")

    def _layout(self, request: Request) -> Layout:
        """Of a single token: the branches, and how large blocks are."""
        config = request.config
        geometry = Geometry(
            q_len=1,
            kv_len=1,
            num_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            is_causal=config.is_causal,
        )
        return lower(request.pattern, geometry, limit_bytes=config.limits.layout_bytes)

    def pin(self, request: Request) -> str:
        """The kernel and the compiler."""
        return f"fused{' in Gluon' if self._is_fed(request) else ''} ({labelled('triton')})"

    def build(self, request: Request) -> FusedKernel:
        """The kernel for `request`; it compiles at its first launch."""
        config, fed = request.config, self._is_fed(request)
        dtype: torch.dtype = getattr(torch, config.dtype)
        tiles = TileSizes.of(config.head_dim, dtype, is_causal=config.is_causal, fed=fed)
        return FusedKernel(self.pin(request), tiles)

    def _is_fed(self, request: Request) -> bool:
        """Whether any of it is computed by the kernels for Hopper."""
        config, layout = request.config, self._layout(request)
        dtype: torch.dtype = getattr(torch, config.dtype)
        if not can_be_fed(config.head_dim, dtype, version("triton")):
            return False
        tiles = TileSizes.of(config.head_dim, dtype, is_causal=config.is_causal, fed=True)
        return bool(layout.branches) or (
            layout.blocks is not None and tiles.within(layout.blocks.block_size).forward.parts > 0
        )
