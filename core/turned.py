"""Dense kernels over inputs that are turned around first, and whose results are turned back.

Shapes: N stacked rectangles, S rows of queries, T of keys, H query heads, K key-value heads, D head_dim. Queries are
(N, S, H, D), keys and values (N, T, K, D); lse is (N, H, S).
"""

from __future__ import annotations

import attrs
from torch import Tensor

from .kernel import DenseKernel, DensePiece


@attrs.frozen
class NegatedQueries:
    """A kernel for the negated queries: what it computes with a scale, `kernel` computes with the opposite one."""

    kernel: DenseKernel

    @property
    def name(self) -> str:
        """As `DenseKernel.name`."""
        return self.kernel.name

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        """As `DenseKernel.forward`."""
        return self.kernel.forward(-query, key, value, piece)

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `DenseKernel.backward`."""
        dq, dk, dv = self.kernel.backward(dout, -query, key, value, out, lse, piece)
        return -dq, dk, dv


@attrs.frozen
class Mirrored:
    """A kernel for rows that are read backwards: of a causal square, row i then sees rows j >= i.

    PyTorch has no negative strides, so inputs are copied, and so are results.
    """

    kernel: DenseKernel

    @property
    def name(self) -> str:
        """As `DenseKernel.name`."""
        return self.kernel.name

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        """As `DenseKernel.forward`."""
        out, lse = self.kernel.forward(query.flip(1), key.flip(1), value.flip(1), piece)
        return out.flip(1), lse.flip(2)

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `DenseKernel.backward`."""
        dout, query, key, value, out = (x.flip(1) for x in (dout, query, key, value, out))
        dq, dk, dv = self.kernel.backward(dout, query, key, value, out, lse.flip(2), piece)
        return dq.flip(1), dk.flip(1), dv.flip(1)
