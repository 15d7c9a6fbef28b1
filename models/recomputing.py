"""Chains of norms, activations and a projection that keep their input alone for the backward.

A norm's output is kept only because the projection after it wants it, and costs as much memory as the norm's input. To
compute it again takes one reading of that input, and no matrix product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Part = Callable[[Tensor], Tensor]


def chained(x: Tensor, *parts: Part | None, recompute: bool, draws: bool = False) -> Tensor:
    """`x` through `parts`, those that are None left out.

    Args:
        x: any tensor.
        parts: the last one a projection.
        recompute: keep x alone for the backward, which computes what the parts before the last make again. The last is
            not: computing again stops where all that it would keep is there, which is before a projection multiplies.
        draws: a part draws random numbers; the backward then draws the same.
    """

    def run(x: Tensor) -> Tensor:
        for part in parts:
            if part is not None:
                x = part(x)
        return x

    if not recompute or not torch.is_grad_enabled():
        return run(x)
    out: Tensor = checkpoint(run, x, use_reentrant=False, preserve_rng_state=draws)
    return out
