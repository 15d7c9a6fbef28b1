"""The `math` backend: PyTorch's matrix products over the pattern alone, in chunks. It drops attention weights.

It is what SDPBackend.MATH is among PyTorch's: not fast, and there for what no fused kernel takes. Unlike that one it
forms no more scores at once than `Limits.workspace_bytes` has room for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor

from ..core.block_product import BlockProduct
from ..core.composer import Composer, merge_
from ..core.draws import Draws
from ..core.dynamic_tables import DynamicTables
from ..core.pattern import LearnedPattern
from ..core.refusal import Refusal
from ..core.schedule import Schedule, schedule
from .dense_products import DenseProducts

if TYPE_CHECKING:
    from ..core.kernel import LayoutPiece
    from ..core.layout import Layout
    from ..registry.specs import Request

_NAME: Final = "matrix products"


class MathBackend:
    """Every pattern, dtype and head_dim. It has no options."""

    def refusals(self, request: Request) -> Iterator[Refusal]:
        """The same bits on every run, where gradients of keys are added atomically."""
        request.options("math", allowed=())
        config = request.config
        is_exact = request.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        if config.deterministic and config.requires_grad and not is_exact:
            actual = f"atomic additions on {request.device.type}, as PyTorch's switch is off"
            remedy = "call torch.use_deterministic_algorithms(True) before building"
            yield Refusal("deterministic", "a deterministic backward", actual, remedy)

    def pin(self, request: Request) -> str:
        """There is one sub-kernel."""
        return _NAME

    def build(self, request: Request) -> MathKernel:
        """The kernel for `request`."""
        config = request.config
        return MathKernel(getattr(torch, config.dtype), config.limits.workspace_bytes)


@attrs.frozen(eq=False)
class _Prepared:
    """A layout, ready on a device: its branches as dense pieces, its blocks, and those that a gate names at a call.

    `drawn` are the calls of a pass with dropout: one for each time that a branch counts, since each draws for itself.
    """

    calls: Schedule
    drawn: Schedule
    blocks: BlockProduct | None
    dynamic: DynamicTables | None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.calls, self.drawn, self.blocks, self.dynamic) if x is not None)

    def calls_of(self, draws: Draws | None) -> Schedule:
        """The dense pieces of one pass."""
        return self.calls if draws is None else self.drawn

    def blocks_of(self, piece: LayoutPiece, draws: Draws | None) -> BlockProduct | None:
        """The product over the blocks of one pass."""
        blocks = self.blocks
        if self.dynamic is not None and piece.tables is not None:
            blocks = self.dynamic.bind(piece.tables)
        return None if blocks is None else attrs.evolve(blocks, scale=piece.scale, draws=draws)


class MathKernel:
    """Computes a `LayoutPiece`; blocks first, then branches, in both passes, so that both draw the same dropout.

    Args:
        dtype: of queries, keys and values.
        workspace_bytes: bound on the temporaries of one step.
    """

    name = _NAME

    def __init__(self, dtype: torch.dtype, workspace_bytes: int) -> None:
        self._dtype = dtype
        self._workspace_bytes = workspace_bytes
        self._prepared: WeakKeyDictionary[Layout, dict[torch.device, _Prepared]] = WeakKeyDictionary()

    def prepare(self, layout: Layout, device: torch.device) -> int:
        """As `Prepares.prepare`."""
        return self._of(layout, device).nbytes

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        """As `LayoutKernel.forward`."""
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        draws, composer = self._drawing(piece, query.device)
        prepared = self._of(piece.layout, query.device)
        blocks, calls = prepared.blocks_of(piece, draws), prepared.calls_of(draws)
        if blocks is None:
            out, lse = composer.forward(query, key, value, calls)
        else:
            out, lse = blocks.forward(query, key, value)
            if calls.calls:
                merge_(out, lse, *composer.forward(query, key, value, calls))
        return out.to(query.dtype), lse

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
        dout, query, key, value, out = (x.contiguous() for x in (dout, query, key, value, out))
        draws, composer = self._drawing(piece, query.device)
        prepared = self._of(piece.layout, query.device)
        blocks, calls = prepared.blocks_of(piece, draws), prepared.calls_of(draws)
        lse = torch.where(lse == -math.inf, math.inf, lse)  # rows without keys, where p is then 0
        grads = None if blocks is None else blocks.gradients(dout, query, key, value, out, lse, dlse)
        if grads is not None and not calls.calls:
            return grads
        given = query, key, value, out, lse, calls
        more = composer.backward(dout, *given) if dlse is None else composer.backward_through_lse(dout, dlse, *given)
        return more if grads is None else (grads[0] + more[0], grads[1] + more[1], grads[2] + more[2])

    def _of(self, layout: Layout, device: torch.device) -> _Prepared:
        known = self._prepared.setdefault(layout, {})
        if device not in known:
            known[device] = self._make(layout, device)
        return known[device]

    def _make(self, layout: Layout, device: torch.device) -> _Prepared:
        geometry, pattern = layout.geometry, layout.pattern.unwrap()
        if isinstance(pattern, LearnedPattern):
            dynamic = DynamicTables.prepare(
                pattern,
                geometry,
                scale=1.0,
                device=device,
                dtype=self._dtype,
                workspace_bytes=self._workspace_bytes,
            )
            return _Prepared(Schedule((), 0), Schedule((), 0), None, dynamic)
        blocks = None
        if layout.blocks is not None:
            blocks = BlockProduct.prepare(
                layout.blocks,
                scale=1.0,
                device=device,
                dtype=self._dtype,
                workspace_bytes=self._workspace_bytes,
            )
        one_by_one = [attrs.evolve(branch, weight=1) for branch in layout.branches for _ in range(branch.weight)]
        return _Prepared(schedule(layout.branches, geometry), schedule(one_by_one, geometry), blocks, None)

    def _drawing(self, piece: LayoutPiece, device: torch.device) -> tuple[Draws | None, Composer]:
        """The dropout of one pass, and what computes its dense pieces with it."""
        draws = None if piece.seed is None else Draws.of(piece.dropout_p, piece.seed, device)
        kernel = DenseProducts(self._workspace_bytes, draws)
        return draws, Composer(kernel, piece.scale, piece.deterministic, self._workspace_bytes)
