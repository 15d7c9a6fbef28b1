"""The `triton` backend: what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ...core.geometry import Geometry
from ...core.lowering import lower
from ...core.refusal import Refusal
from ..libraries import checked_options, labelled
from .kernel import FusedKernel, Tiles
from .walks import MAX_PERIOD, period_of

if TYPE_CHECKING:
    from ...registry.specs import Request


class TritonBackend:
    """All branches of a dilated pattern in one launch of our own kernel. It has no options."""

    def refusals(self, request: Request) -> Iterator[Refusal]:
        """Dilation rates whose classes of positions repeat too late."""
        checked_options(request, "triton")
        config = request.config
        length = config.seq_len or 1
        geometry = Geometry(
            q_len=length,
            kv_len=length,
            num_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            is_causal=config.is_causal,
        )
        period = period_of(lower(request.pattern, geometry).branches)
        if period > MAX_PERIOD:
            required = f"dilation rates with the least common multiple {period}"
            yield Refusal("dilation_rates", required, f"up to {MAX_PERIOD}", "use rates that divide one another")

    def pin(self, request: Request) -> str:
        """The kernel and the compiler."""
        return f"fused dilated ({labelled('triton')})"

    def build(self, request: Request) -> FusedKernel:
        """The kernel for `request`; it compiles at its first launch."""
        tiles = Tiles.of(request.config.head_dim, getattr(torch, request.config.dtype))
        return FusedKernel(self.pin(request), tiles)
