"""Dense kernels over inputs that are turned around first, and whose results are turned back.

Shapes: N stacked rectangles, S rows of queries, T of keys, H query heads, K key-value heads, D head_dim. Queries are
(N, S, H, D), keys and values (N, T, K, D); lse is (N, H, S).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

    Attributes:
        kernel: gets the copies.
        workspace_bytes: of all inputs that are copied at once, if one rectangle's are not more.
    """

    kernel: DenseKernel
    workspace_bytes: int

    @property
    def name(self) -> str:
        """As `DenseKernel.name`."""
        return self.kernel.name

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        """As `DenseKernel.forward`."""

        def compute(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            out, lse = self.kernel.forward(query, key, value, piece)
            return out, lse.transpose(1, 2)

        out, lse = self._backwards(compute, (query, key, value))
        return out, lse.transpose(1, 2)

    def backward(
        self, dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, piece: DensePiece
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `DenseKernel.backward`."""

        def compute(
            dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor
        ) -> tuple[Tensor, ...]:
            return self.kernel.backward(dout, query, key, value, out, lse.transpose(1, 2), piece)

        dq, dk, dv = self._backwards(compute, (dout, query, key, value, out, lse.transpose(1, 2)))
        return dq, dk, dv

    def _backwards(self, compute: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What `compute` gives for inputs (N, rows, ...) read backwards, for a few of the N at a time, read so too."""
        size = inputs[0].shape[0]
        each = sum(x[0].numel() * x.element_size() for x in inputs)
        step = max(1, self.workspace_bytes // each)
        totals: list[Tensor] = []
        for start in range(0, size, step):
            some = slice(start, start + step)
            parts = [x.flip(1) for x in compute(*(x[some].flip(1) for x in inputs))]
            if step >= size:
                return parts
            totals = totals or [part.new_empty((size, *part.shape[1:])) for part in parts]
            for total, part in zip(totals, parts, strict=True):
                total[some] = part
        return totals
