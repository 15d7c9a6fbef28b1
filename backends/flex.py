"""The `flex` backend: PyTorch's FlexAttention over our tables of blocks.

Any pattern is lowered wholly to blocks, strided branches too, whose blocks are all masked: right, and slow. The
backward computes the forward again, because FlexAttention's own is reached through autograd alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..core.blocking import lower_blocks
from ..core.errors import ConfigError
from ..core.refusal import Refusal
from .cards import age_refusals, compiled_for
from .flex_compiled import CompiledAttend
from .flex_tables import BLOCK_SIZE, FlexTables, WeightedBlocks, bounds_of_bytes
from .libraries import compiler_refusals
from .recording import not_recording, of_part, recording

if TYPE_CHECKING:
    from ..core.geometry import Geometry
    from ..core.kernel import LayoutPiece
    from ..core.layout import Layout
    from ..core.pattern import Pattern
    from ..registry.specs import Request

_REMEDY: Final = "raise Limits.layout_bytes, shorten the sequence or use another backend"
# query, key, value (B, heads, len, D), scale -> out (B, H, S, D), lse (B, H, S); differentiable
Attend = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


class MakesAttend(Protocol):
    """Makes what computes a layout."""

    def __call__(self, tables: FlexTables, *, any_length: bool) -> Attend:
        """See `CompiledAttend`."""


class FlexBackend:
    """FlexAttention: every pattern that is known when a length is met, on CUDA."""

    def refusals(self, request: Request) -> Iterator[Refusal]:
        """No compiler, cards that it has none for, and tables that are too large at the length of the request."""
        yield from age_refusals(compiled_for(request.device.arch))
        yield from compiler_refusals()
        config = request.config
        if config.seq_len is None:
            return
        limit = config.limits.layout_bytes
        needed = _needed_bytes(request.pattern, config.geometry(config.seq_len), limit)
        if needed > limit:
            required = f"{needed:,} bytes for tables of {config.seq_len:,} tokens"
            yield Refusal("layout_bytes", required, f"{limit:,} bytes", _REMEDY)

    def pin(self, request: Request) -> str:
        """FlexAttention is part of PyTorch."""
        return f"FlexAttention (torch {torch.__version__})"

    def build(self, request: Request) -> FlexKernel:
        """The kernel for `request`; it compiles at its first call of its own length, and of all others."""
        config = request.config
        own = None if config.seq_len is None else config.seq_len // config.ring_size
        return FlexKernel(self.pin(request), config.limits.layout_bytes, own)


def _needed_bytes(pattern: Pattern, geometry: Geometry, limit_bytes: int) -> int:
    """What the tables take, as far as that decides: lowered for it is only what may fit or not."""
    least, most = bounds_of_bytes(geometry, _distinct_heads(pattern, geometry))
    if most <= limit_bytes or least > limit_bytes:
        return least
    try:
        blocks = lower_blocks(pattern, geometry, block_size=BLOCK_SIZE, limit_bytes=limit_bytes)
    except ConfigError:  # the blocks are more already
        return most
    return WeightedBlocks.of(blocks).nbytes


def _distinct_heads(pattern: Pattern, geometry: Geometry) -> int:
    return len(set(pattern.head_groups(geometry.num_heads, geometry.num_kv_heads)))


class FlexKernel:
    """Computes a `LayoutPiece` in one launch forward.

    Args:
        name: the pinned sub-kernel, as the plan shows it.
        limit_bytes: most bytes of a layout's tables.
        own_length: of queries and keys that calls will mostly have, for which it is compiled by itself.
        make: makes what computes a layout.
    """

    def __init__(
        self, name: str, limit_bytes: int, own_length: int | None = None, make: MakesAttend = CompiledAttend
    ) -> None:
        self.name = name
        self.limit_bytes = limit_bytes
        self.own_length = own_length
        self.make = make
        self._made: WeakKeyDictionary[Layout, dict[torch.device, tuple[FlexTables, Attend]]] = WeakKeyDictionary()

    def prepare(self, layout: Layout, device: torch.device) -> int:
        """Make the tables of a layout ahead of its first call."""
        return self.tables(layout, device)[0].nbytes

    def tables(self, layout: Layout, device: torch.device) -> tuple[FlexTables, Attend]:
        """The tables of a layout on the device, and what computes it; made once.

        Raises:
            ConfigError: they need more than `limit_bytes`.
        """
        known = self._made.setdefault(layout, {})
        if device not in known:
            geometry = layout.geometry
            self._check_bytes(geometry, bounds_of_bytes(geometry, _distinct_heads(layout.pattern, geometry))[0])
            blocks = lower_blocks(layout.pattern, geometry, block_size=BLOCK_SIZE, limit_bytes=self.limit_bytes)
            listed = WeightedBlocks.of(blocks)
            self._check_bytes(geometry, listed.nbytes)
            tables = FlexTables.of(listed, device)
            is_own = geometry.q_len == geometry.kv_len == self.own_length
            known[device] = tables, self.make(tables, any_length=not is_own)
        return known[device]

    def _check_bytes(self, geometry: Geometry, needed: int) -> None:
        if needed > self.limit_bytes:
            raise ConfigError(
                f"FlexAttention's tables for {geometry.q_len:,} queries and {geometry.kv_len:,} keys need {needed:,} "
                f"bytes, allowed are {self.limit_bytes:,}; {_REMEDY}"
            )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        """As `LayoutKernel.forward`."""
        with not_recording():
            out, lse = self._attend(_compact(query), _compact(key), _compact(value), piece)
        return out.transpose(1, 2).to(query.dtype), lse.to(torch.float32)

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
        """As `LayoutKernel.backward`; computes the forward again and differentiates it."""
        with recording():
            # Leaves as they are compiled for: a compiler looks for the gradient of whatever records one.
            leaves = [_compact(x.detach()).requires_grad_() for x in (query, key, value)]
            results = self._attend(leaves[0], leaves[1], leaves[2], piece)
            upstream: tuple[Tensor, Tensor | None] = (dout, dlse)
            if piece.is_part:
                part, part_lse = (x.detach() for x in results)
                upstream = of_part(dout, dlse, out, lse, part.transpose(1, 2), part_lse)
            turned = (upstream[0].transpose(1, 2), upstream[1])
            used = [(x, grad.to(x.dtype)) for x, grad in zip(results, turned, strict=True) if grad is not None]
            found = torch.autograd.grad([x for x, _ in used], leaves, [grad for _, grad in used])
            dq, dk, dv = (x.transpose(1, 2) for x in found)
        return dq, dk, dv

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        _, attend = self.tables(piece.layout, query.device)
        return attend(query, key, value, piece.scale)


def _compact(x: Tensor) -> Tensor:
    """(B, heads, len, D) as FlexAttention takes it, over compact memory, so that other strides compile nothing anew.

    Those of dimensions of size 1 too, which are any in what is contiguous.
    """
    return x.reshape(-1).view(x.shape).transpose(1, 2)
