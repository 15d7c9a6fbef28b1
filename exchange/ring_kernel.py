"""A kernel for whole layouts with what a ring needs beside it: a dense kernel for the rows that others send."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from ..core.kernel import DenseKernel, LayoutKernel, LayoutPiece, Prepares

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..core.layout import Layout


@attrs.frozen(eq=False)
class RingKernel:
    """By itself the layout kernel; so an attention of one rank carries what `rebuild` needs for several.

    Attributes:
        layout: of the chosen backend.
        dense: of its companion, for dense pieces over received rows.
        companion: the companion's name.
        takes_staged: `layout` computes tables of blocks over received rows too.
    """

    layout: LayoutKernel
    dense: DenseKernel
    companion: str
    takes_staged: bool

    @property
    def name(self) -> str:
        """The layout kernel's."""
        return self.layout.name

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: LayoutPiece) -> tuple[Tensor, Tensor]:
        """As `LayoutKernel.forward`."""
        return self.layout.forward(query, key, value, piece)

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
        return self.layout.backward(dout, query, key, value, out, lse, piece, dlse=dlse)

    def prepare(self, layout: Layout, device: torch.device) -> int:
        """As `Prepares.prepare`, where the layout kernel has it."""
        return self.layout.prepare(layout, device) if isinstance(self.layout, Prepares) else 0
