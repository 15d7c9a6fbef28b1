"""The `math` backend: PyTorch's matrix products over the pattern alone, in chunks. It drops attention weights.

It is what SDPBackend.MATH is among PyTorch's: not fast, and there for what no fused kernel takes. Unlike that one it
forms no more scores at once than `Limits.workspace_bytes` has room for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor

from ..core import composed
from ..core.block_product import BlockProduct
from ..core.composer import Composer
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
    """Computes a `LayoutPiece`, on compact tensors: what is computed together, and so draws, is alike in both passes.

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
        out, lse = composed.forward(*self._pass(piece, query.device), query, key, value)
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
        return composed.backward(*self._pass(piece, query.device), dout, dlse, query, key, value, out, lse)

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

    def _pass(self, piece: LayoutPiece, device: torch.device) -> tuple[Composer, Schedule, BlockProduct | None]:
        """What computes dense pieces, which they are, and the product over blocks, for one pass.

        Pieces and blocks each draw a dropout of their own, so that it does not matter which come first.
        """
        prepared = self._of(piece.layout, device)
        of_calls = of_blocks = None
        if piece.seed is not None:
            of_calls, of_blocks = (Draws.of(piece.dropout_p, piece.seed + n, device) for n in range(2))
        composer = Composer(
            DenseProducts(self._workspace_bytes, of_calls), piece.scale, piece.deterministic, self._workspace_bytes
        )
        return composer, prepared.calls_of(of_calls), prepared.blocks_of(piece, of_blocks)
