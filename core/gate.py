"""What chooses the blocks of a learned pattern, as the attention and its users see it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from .pattern import Pattern


class Gate(nn.Module, ABC):
    """Chooses key blocks for blocks of queries; `LearnedPattern.make_gate` makes one, `attention.gate` is it.

    Shapes: B batch, S query length, T key length, H query heads, K key-value heads, D head_dim, R blocks of queries.
    `forward` takes query (B, S, H, D) and key (B, T, K, D); the other methods take them as the attention does, laid out
    as the configuration's `tensor_layout` says.
    """

    @abstractmethod
    def forward(self, query: Tensor, key: Tensor, *, q_offset: int = 0, kv_offset: int = 0) -> Tensor:
        """The blocks to keep; what the attention calls. Nothing is differentiated through it.

        Args:
            query: (B, S, H, D).
            key: (B, T, K, D).
            q_offset: absolute position of the first query.
            kv_offset: absolute position of the first key.

        Returns:
            (B, H, R, k) int64: in each row the blocks that the diagonal cuts, then the chosen ones, no block twice, as
            many as `core.dynamic_tables.TableRows` counts, and after them -1.
        """

    @abstractmethod
    def distillation_loss(
        self,
        query: Tensor,
        key: Tensor,
        *,
        q_offset: int | None = None,
        kv_offset: int = 0,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """A scalar that teaches the gate where full attention goes; query and key learn nothing from it.

        Args:
            query: as the attention gets it.
            key: as the attention gets it.
            q_offset: absolute position of the first query; default: the last query stands at the last key.
            kv_offset: absolute position of the first key.
            key_padding_mask: as the attention gets it; each sequence is as it would be alone.
            cu_seqlens: as the attention gets it, likewise.
        """

    @abstractmethod
    def kept_mass(
        self,
        query: Tensor,
        key: Tensor,
        *,
        q_offset: int | None = None,
        kv_offset: int = 0,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The share of full attention's weights that lies in the blocks kept now; arguments as above.

        Returns (B, H, S), for each query; 0 for those without keys and for padding.
        """

    @abstractmethod
    def freeze(
        self,
        query: Tensor,
        key: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Pattern:
        """A fixed pattern of the blocks kept for these queries and keys, of sequences that have one length."""
