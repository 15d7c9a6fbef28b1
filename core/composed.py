"""Dense calls and a table of blocks together, as one attention, and which composer a call gets for the first.

Shapes as in `composer`. The backward hands both the merged out and lse; a gradient of lse goes to both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from .composer import Composer
from .kernel import DenseKernel, ForOneLength
from .merging import merge_

if TYPE_CHECKING:
    from .config import AttentionConfig
    from .kernel import BlockTable
    from .schedule import Schedule


@attrs.frozen
class Composers:
    """A `Composer` for calls of the length that an attention is built for, and one for all others.

    Kernels that prepare for every length serve only the first.
    """

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


def forward(
    composer: Composer, calls: Schedule, blocks: BlockTable | None, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Return out (B, S, H, D), in the accumulator's dtype where results were merged, and lse (B, H, S)."""
    if blocks is None:
        return composer.forward(query, key, value, calls)
    out, lse = blocks.forward(query, key, value)
    if calls.calls:
        merge_(out, lse, *composer.forward(query, key, value, calls))
    return out, lse


def backward(
    composer: Composer,
    calls: Schedule,
    blocks: BlockTable | None,
    dout: Tensor,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv; `lse` is -inf in rows without keys."""
    if blocks is not None or calls.cover == 0:
        lse = torch.where(lse == -math.inf, math.inf, lse)  # rows without keys: every kernel then finds p = 0
    grads = None
    if calls.calls:
        given = (query, key, value, out, lse, calls)
        grads = composer.backward(dout, *given) if dlse is None else composer.backward_through_lse(dout, dlse, *given)
    if blocks is not None:
        more = blocks.gradients(dout, query, key, value, out, lse, dlse)
        return more if grads is None else (more[0] + grads[0], more[1] + grads[1], more[2] + grads[2])
    if grads is None:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    return grads
