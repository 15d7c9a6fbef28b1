"""Dense calls and a table of blocks together, as one attention.

Shapes as in `composer`. The backward hands both the merged out and lse; a gradient of lse goes to both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .composer import merge_

if TYPE_CHECKING:
    from .composer import Composer
    from .kernel import BlockTable
    from .schedule import Schedule


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
