"""The `flex` backend: PyTorch's FlexAttention over our tables of blocks, compiled for each length.

Any pattern is lowered wholly to blocks, strided branches too, whose blocks are all masked: right, and slow. The
backward computes the forward again, because FlexAttention's own is reached through autograd alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, FlexKernelOptions, flex_attention

from ..core.blocking import lower_blocks
from ..core.errors import ConfigError
from ..core.geometry import Geometry
from ..core.refusal import Refusal
from .cards import age_refusals, compiled_for
from .flex_tables import FlexTables, ScoreMod, table_bytes
from .libraries import compiler_refusals
from .recording import not_recording, of_part, recording

if TYPE_CHECKING:
    from ..core.kernel import LayoutPiece
    from ..core.layout import Layout
    from ..registry.specs import Request

BLOCK_SIZE: Final = 128
_REMEDY: Final = "raise Limits.layout_bytes, shorten the sequence or use another backend"
# The modifiers' loads would be kept for several stages too, for which shared memory is too small; and few queries would
# get another kernel, which has no tiles for every type.
_OPTIONS: Final[FlexKernelOptions] = {"num_stages": 1, "FORCE_USE_FLEX_ATTENTION": True}
# query, key, value (B, heads, len, D), score_mod, block_mask, scale -> out (B, H, S, D), lse (B, H, S);
# differentiable
Attend = Callable[[Tensor, Tensor, Tensor, ScoreMod | None, BlockMask, float], tuple[Tensor, Tensor]]


class FlexBackend:
    """FlexAttention: every pattern that is known when a length is met, on CUDA."""

    def refusals(self, request: Request) -> Iterator[Refusal]:
        """No compiler, cards that it has none for, and tables that are too large at the length of the request."""
        yield from age_refusals(compiled_for(request.device.arch))
        yield from compiler_refusals()
        config = request.config
        if config.seq_len is None:
            return
        geometry = Geometry.self_attention(config.seq_len, config.num_heads)
        needed = table_bytes(geometry, BLOCK_SIZE, _tables_of(request))
        if needed > config.limits.layout_bytes:
            required = f"{needed:,} bytes for tables of {config.seq_len:,} tokens"
            yield Refusal("layout_bytes", required, f"{config.limits.layout_bytes:,} bytes", _REMEDY)

    def pin(self, request: Request) -> str:
        """FlexAttention is part of PyTorch."""
        return f"FlexAttention (torch {torch.__version__})"

    def build(self, request: Request) -> FlexKernel:
        """The kernel for `request`; it compiles at its first call of each length."""
        return FlexKernel(self.pin(request), request.config.limits.layout_bytes, compiled)


def _tables_of(request: Request) -> int:
    config = request.config
    return len(set(request.pattern.head_groups(config.num_heads, config.kv_heads)))


def attend(
    query_BHSD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    score_mod: ScoreMod | None,
    block_mask: BlockMask,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """What is compiled; never called as it is, since without a compiler it would form all scores."""
    out, aux = flex_attention(
        query_BHSD,
        key_BKTD,
        value_BKTD,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        kernel_options=_OPTIONS,
        enable_gqa=query_BHSD.shape[1] != key_BKTD.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return out, aux.lse


def compiled(name: str) -> Attend:
    """A compiled `attend` that counts its recompilations for itself, and fails rather than run without a compiler.

    The compiler keeps what it compiled, and how often, with the code of a function: a copy has its own.
    """
    own = FunctionType(attend.__code__.replace(co_name=f"attend_{name}"), attend.__globals__)
    run: Attend = torch.compile(own, fullgraph=True)
    return run


class FlexKernel:
    """Computes a `LayoutPiece` in one launch forward.

    Args:
        name: the pinned sub-kernel, as the plan shows it.
        limit_bytes: most bytes of a layout's tables.
        make: makes what computes a layout, from a name of its own.
    """

    def __init__(self, name: str, limit_bytes: int, make: Callable[[str], Attend]) -> None:
        self.name = name
        self.limit_bytes = limit_bytes
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
            groups = layout.pattern.head_groups(geometry.num_heads, geometry.num_kv_heads)
            needed = table_bytes(geometry, BLOCK_SIZE, len(set(groups)))
            if needed > self.limit_bytes:
                raise ConfigError(
                    f"FlexAttention's tables for {geometry.q_len:,} queries and {geometry.kv_len:,} keys need "
                    f"{needed:,} bytes, allowed are {self.limit_bytes:,}; {_REMEDY}"
                )
            blocks = lower_blocks(layout.pattern, geometry, block_size=BLOCK_SIZE, limit_bytes=self.limit_bytes)
            known[device] = FlexTables.of(blocks, device), self.make(layout.digest[:16])
        return known[device]

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
        tables, run = self.tables(piece.layout, query.device)
        return run(query, key, value, tables.score_mod, tables.block_mask, piece.scale)


def _compact(x: Tensor) -> Tensor:
    """(B, heads, len, D) as FlexAttention takes it, over compact memory, so that other strides compile nothing anew."""
    return x.contiguous().transpose(1, 2)
