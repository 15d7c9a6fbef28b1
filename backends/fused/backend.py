"""The `triton` backend: what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import torch

from ...core.geometry import one_token
from ...core.lowering import split, table_block_size
from ...core.pattern import LearnedPattern
from ...core.refusal import Refusal
from ..libraries import checked_options, compiler_refusals, labelled
from .kernel import FusedKernel
from .tiles import TileSizes, can_be_fed
from .walks import MAX_PERIOD, period_of

MIN_BLOCK: Final = 16  # what a product of tiles takes

if TYPE_CHECKING:
    from ...core.pattern import Branch
    from ...registry.specs import Request


class TritonBackend:
    """All branches, or all blocks, in one launch of our own kernels. It has no options."""

    def refusals(self, request: Request) -> Iterator[Refusal]:
        """No compiler; dilation rates whose classes of positions repeat too late; blocks that no tile divides."""
        checked_options(request, "triton")
        yield from compiler_refusals()
        branches, size = _shape(request)
        period = period_of(branches)
        if period > MAX_PERIOD:
            required = f"dilation rates with the least common multiple {period}"
            yield Refusal("dilation_rates", required, f"up to {MAX_PERIOD}", "use rates that divide one another")
        if 0 < size < MIN_BLOCK or size & (size - 1):
            yield Refusal("block_sizes", str(size), f"powers of two from {MIN_BLOCK}", "choose such a block_size")

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
        config, (branches, size) = request.config, _shape(request)
        dtype: torch.dtype = getattr(torch, config.dtype)
        if not can_be_fed(config.head_dim, dtype, version("triton")):
            return False
        tiles = TileSizes.of(config.head_dim, dtype, is_causal=config.is_causal, fed=True)
        return bool(branches) or (size > 0 and tiles.within(size).forward.parts > 0)


def _shape(request: Request) -> tuple[tuple[Branch, ...], int]:
    """The branches of a layout, and how large its blocks are, or 0."""
    config, pattern = request.config, request.pattern.unwrap()
    if isinstance(pattern, LearnedPattern):
        return (), pattern.block_size
    heads = config.num_heads, config.kv_heads, config.is_causal
    branches, rest = split(request.pattern, one_token(*heads))
    return branches, 0 if rest is None else table_block_size(request.pattern, *heads)
