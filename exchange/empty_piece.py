"""The piece of a sharded sequence in which there is nothing to compute."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from ..core.empty import empty_gradients, empty_results

if TYPE_CHECKING:
    from torch import Tensor

    from .compute import Merged


@attrs.frozen
class EmptyPiece:
    """A `Piece` without pairs, which no kernel is asked for."""

    pairs: int = 0
    nbytes: int = 0
    is_empty: bool = True
    merges: int = 0

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Piece.forward`."""
        return empty_results(query)

    def merge_into(self, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor) -> None:
        """As `Piece.merge_into`."""

    def backward(self, merged: Merged, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """As `Piece.backward`."""
        return empty_gradients(merged.query, key, value)[1:]
