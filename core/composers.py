"""Which composer a call gets: kernels that prepare for every length serve the one that an attention is built for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from .composer import Composer
from .kernel import DenseKernel, ForOneLength

if TYPE_CHECKING:
    from .config import AttentionConfig


@attrs.frozen
class Composers:
    """A `Composer` for calls of the length that an attention is built for, and one for all others."""

    seq_len: int | None
    own: Composer
    others: Composer

    @classmethod
    def of(cls, kernel: DenseKernel, scale: float, config: AttentionConfig) -> Composers:
        """Of the kernel that a backend built."""
        own = others = Composer(kernel, scale, config.deterministic, config.limits.workspace_bytes)
        if isinstance(kernel, ForOneLength) and config.seq_len is not None:
            others = attrs.evolve(own, kernel=kernel.other_lengths)
        return cls(config.seq_len, own, others)

    def for_call(self, q_len: int, kv_len: int, is_filled: bool = False) -> Composer:
        """That of a call of so many queries and keys, over all ranks; `is_filled`: of documents that have fewer."""
        return self.own if q_len == kv_len == self.seq_len and not is_filled else self.others
