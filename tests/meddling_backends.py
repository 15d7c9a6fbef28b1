"""Backends that compute what they should and do something beside: keep memory, write to inputs, change the process.

The conformance kit has to tell.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilated_attention.core.kernel import DensePiece

from .plain_backends import Dense, Grads


class KeepsItsBuffer(Dense):
    """Gives out the same buffer again and again."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[int, ...], Tensor] = {}

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(query, key, value, piece)
        return self.buffers.setdefault(tuple(out.shape), torch.empty(out.shape)).copy_(out), lse


class WritesIntoInputs(Dense):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        result = super().forward(query, key, value, piece)
        query[:, 0] *= 1.001
        return result


class KeepsItsInputs(Dense):
    """Remembers the keys of its last call."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        self.last = key
        return super().forward(query, key, value, piece)


class Seeds(Dense):
    """Sets the caller's seed, to the same number every time."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return super().forward(query, key, value, piece)


class DrawsInBackward(Dense):
    def backward(self, *args: Any) -> Grads:
        torch.rand(1)
        return super().backward(*args)


class RoundsProducts(Dense):
    """Lets PyTorch round the products of float32, and leaves it so."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, piece: DensePiece) -> tuple[Tensor, Tensor]:
        torch.set_float32_matmul_precision("medium")
        return super().forward(query, key, value, piece)
